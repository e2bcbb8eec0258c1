"""`flix launch`: its flags, and what it does with them."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flix_jax.cli import commands
from flix_jax.cli.commands import UsageError

if TYPE_CHECKING:
    from flix_jax.experiments.launch.accelerators import Slices
    from flix_jax.experiments.launch.gcloud import Machines
    from flix_jax.experiments.launch.gke import Cluster
    from flix_jax.experiments.launch.job import Job
    from flix_jax.experiments.launch.shell import Shell
    from flix_jax.experiments.launch.slurm import Allocation

ENGINES = ("tpu_vm", "queued_resource", "gke", "xpk", "slurm")
ACTIONS = ("run", "follow", "fetch", "delete")

# Flags that only some engines know of.
ONLY = {
    "accelerator": ("tpu_vm", "queued_resource", "gke", "xpk"),
    "topology": ("tpu_vm", "queued_resource", "gke", "xpk"),
    "slices": ("queued_resource", "gke", "xpk"),
    "zone": ("tpu_vm", "queued_resource", "gke", "xpk"),
    "project": ("tpu_vm", "queued_resource", "gke", "xpk"),
    "capacity": ("tpu_vm", "queued_resource", "gke", "xpk"),
    "runtime": ("tpu_vm", "queued_resource"),
    "cluster": ("gke", "xpk"),
    "reservation": ("gke", "xpk"),
    "image": ("gke", "xpk"),
    "service_account": ("gke",),
    "nodes": ("slurm",),
    "gpus_per_node": ("slurm",),
}
# Flags of what is started, which other actions have no use for.
STARTING = ("gin_file", "fetch", "delete", "detach")


def add_launch(parsers: Any, command: Callable[..., Any], gin_help: str) -> None:
    """Adds the command to those of `parsers`; `command` makes its parser."""
    parser = command(
        parsers,
        "launch",
        launch,
        "train a run on a pod or a cluster",
        "Makes the machines by an engine that exists, installs this commit on every worker,\n"
        "trains there, follows the log, and brings back results. Nothing is deleted unless asked\n"
        "for. --dry_run shows every command and executes none.",
        "  flix launch --engine=queued_resource --accelerator=v5litepod-256 --zone=us-west4-a \\\n"
        "      --gin_file=configs/experiments/xtreme_up.gin --run_dir=gs://bucket/runs/x --dry_run",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="tpu_vm and queued_resource: Cloud TPU by gcloud; gke: a JobSet by kubectl; xpk: "
        "xpk workload create; slurm: sbatch, for GPUs",
    )
    parser.add_argument(
        "--action",
        choices=ACTIONS,
        default="run",
        help="what to do; follow, fetch and delete are for what runs already (default: run)",
    )
    parser.add_argument(
        "--local_processes",
        type=int,
        metavar="N",
        help="in place of an engine: train in N processes of this machine, as a pod would",
    )
    parser.add_argument(
        "--devices_per_process",
        type=int,
        metavar="N",
        help="virtual devices of each local process",
    )
    parser.add_argument(
        "--run_dir", required=True, metavar="DIR", help="folder of the run; a bucket for pods"
    )
    parser.add_argument(
        "--name", help="of the machines or the job (default: flix- and the last part of --run_dir)"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the commands and stop")
    _add_machines(parser.add_argument_group("machines"))
    _add_course(parser.add_argument_group("course"))
    _add_code(parser.add_argument_group("code"))
    group = parser.add_argument_group("configuration", gin_help)
    group.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="gin file (repeatable)"
    )


def _add_machines(group: Any) -> None:
    group.add_argument(
        "--accelerator", metavar="TYPE", help="as Google Cloud names it: v4-128, v5litepod-256"
    )
    group.add_argument(
        "--topology", metavar="KIND:SHAPE", help="as flix plan names it: v5e:16x16, v5e:16x16*2"
    )
    group.add_argument("--slices", type=int, metavar="N", help="that train as one (default: 1)")
    group.add_argument("--zone", help="of the TPUs, or of the cluster (or its region)")
    group.add_argument("--project", help="(default: that of gcloud's configuration)")
    group.add_argument(
        "--capacity",
        choices=("on_demand", "spot", "reserved"),
        help="(default: on_demand)",
    )
    group.add_argument("--reservation", metavar="NAME", help="of reserved capacity, for GKE")
    group.add_argument("--runtime", metavar="VERSION", help="of TPU VMs (default: by the TPU)")
    group.add_argument("--cluster", metavar="NAME", help="of GKE (default: kubectl's context)")
    group.add_argument("--image", help="of the container that trains (default: python:3.11)")
    group.add_argument("--service_account", metavar="NAME", help="of Kubernetes, for the bucket")
    group.add_argument("--nodes", type=int, metavar="N", help="of SLURM (default: 1)")
    group.add_argument("--gpus_per_node", type=int, metavar="N", help="of SLURM (default: 8)")
    group.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag more for the command that makes the machines or the job, such as "
        "--extra=--network=mine or --extra=--partition=a100 (repeatable)",
    )


def _add_course(group: Any) -> None:
    group.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after N preemptions or losses of a machine, from the last checkpoint; "
        "preempted machines are deleted for it (default: 0)",
    )
    group.add_argument(
        "--grace_seconds",
        dest="grace",
        type=float,
        metavar="S",
        help="of flix train, after SIGTERM (default: its own)",
    )
    group.add_argument("--detach", action="store_true", help="return when training has started")
    group.add_argument("--fetch", metavar="DIR", help="copy the results there afterwards")
    group.add_argument(
        "--delete", action="store_true", help="delete the machines when training has succeeded"
    )
    group.add_argument(
        "--poll", type=float, default=30.0, metavar="S", help="seconds between looks (default: 30)"
    )
    group.add_argument("--hours", type=float, metavar="X", help="you expect, for the cost")
    group.add_argument(
        "--step_seconds", type=float, metavar="X", help="of a step, as flix plan prints it"
    )


def _add_code(group: Any) -> None:
    group.add_argument(
        "--code", metavar="DIR", help="git checkout (default: that which flix runs from)"
    )
    group.add_argument(
        "--allow_dirty", action="store_true", help="launch files that differ from the commit"
    )
    group.add_argument(
        "--launch_dir", metavar="DIR", help="local folder to pack (default: launches/NAME)"
    )


def launch(arguments: argparse.Namespace) -> None:
    if (arguments.engine is None) == (arguments.local_processes is None):
        raise UsageError("give one of --engine and --local_processes")
    if arguments.local_processes is not None:
        _run_here(arguments)
        return
    from flix_jax.experiments.launch import job
    from flix_jax.experiments.launch.shell import Shell

    if arguments.devices_per_process is not None:
        raise UsageError("--devices_per_process has no effect without --local_processes")
    _check(arguments)
    job.check_run_dir(arguments.run_dir, shared=arguments.engine == "slurm")
    if arguments.engine == "slurm" and "://" not in arguments.run_dir:
        arguments.run_dir = os.path.abspath(arguments.run_dir)
    arguments.name = arguments.name or job.usual_name(arguments.run_dir)
    job.check_name(arguments.name)
    arguments.launch_dir = arguments.launch_dir or os.path.join("launches", arguments.name)
    shell = Shell(arguments.dry_run, arguments.poll)
    if arguments.action == "run":
        _run(arguments, shell)
    else:
        _act(arguments, shell, arguments.action)


def _run_here(arguments: argparse.Namespace) -> None:
    if not arguments.gin_file:
        raise UsageError("--gin_file is missing: what is to be trained")
    from flix_jax.experiments.launch import local
    from flix_jax.experiments.launch.shell import written

    train = ["train", *(f"--gin_file={name}" for name in arguments.gin_file)]
    train += [f"--run_dir={arguments.run_dir}", *(f"--gin.{b}" for b in arguments.bindings)]
    if arguments.grace is not None:
        train.append(f"--grace_seconds={arguments.grace:g}")
    count, devices = arguments.local_processes, arguments.devices_per_process
    started = local.commands(train, count, devices)
    if arguments.dry_run:
        print("\n".join(map(written, started)))
        return
    status = local.run(started)
    if status:
        raise SystemExit(status)


def _check(arguments: argparse.Namespace) -> None:
    engine = arguments.engine
    for name, engines in ONLY.items():
        if getattr(arguments, name) is not None and engine not in engines:
            raise UsageError(
                f"--{name} has no effect with --engine={engine}; it goes with {', '.join(engines)}"
            )
    if arguments.action == "run" and not arguments.gin_file:
        raise UsageError("--gin_file is missing: what is to be trained")
    for name in STARTING:
        given = getattr(arguments, name)
        if given and arguments.action != "run" and name != arguments.action:
            raise UsageError(f"--{name} has no effect with --action={arguments.action}")
    if engine in ("tpu_vm", "queued_resource") and arguments.zone is None:
        raise UsageError(f"--engine={engine} needs --zone")
    after = [name for name in ("fetch", "delete") if getattr(arguments, name)]
    if after and arguments.action == "run" and (arguments.detach or engine == "slurm"):
        how = "--detach" if arguments.detach else "--engine=slurm"
        raise UsageError(f"{how} returns before training ends: use --action={after[0]} then")
    for name in ("hours", "step_seconds"):
        if getattr(arguments, name) is not None and getattr(arguments, name) <= 0:
            raise UsageError(f"--{name}={getattr(arguments, name):g}: expected more than 0")
    if arguments.restarts < 0:
        raise UsageError(f"--restarts={arguments.restarts}: expected at least 0")


def _slices(arguments: argparse.Namespace) -> "Slices":
    from flix_jax.experiments.launch import accelerators

    if (arguments.accelerator is None) == (arguments.topology is None):
        raise UsageError("give one of --accelerator=v5litepod-256 and --topology=v5e:16x16")
    if arguments.topology is not None:
        return accelerators.of_topology(arguments.topology, arguments.slices)
    count = 1 if arguments.slices is None else arguments.slices
    return accelerators.of_type(arguments.accelerator, count)


def _run(arguments: argparse.Namespace, shell: "Shell") -> None:
    from flix_jax import buckets
    from flix_jax.experiments.launch import checkout, job, slurm

    on_slurm = arguments.engine == "slurm"
    machines: Slices | Allocation
    if on_slurm:
        machines = slurm.Allocation(
            1 if arguments.nodes is None else arguments.nodes,
            8 if arguments.gpus_per_node is None else arguments.gpus_per_node,
            tuple(arguments.extra),
        )
    else:
        machines = _slices(arguments)
    run, config = commands._build(arguments, arguments.gin_file)
    with config.placing_errors():
        job.check_run(run, shared=on_slurm)
        job.check_mesh(run, machines.jax_devices)
    gin_files, copies = job.travelling(arguments.gin_file, config.files)
    launched = job.Job(
        arguments.name,
        arguments.run_dir,
        arguments.launch_dir,
        checkout.find(arguments.code, allow_dirty=arguments.allow_dirty),
        ("gpu" if on_slurm else "tpu") + (",gcs" if buckets.is_bucket(arguments.run_dir) else ""),
        gin_files,
        copies,
        tuple(arguments.bindings),
        arguments.grace,
    )
    shell.say(f"machines: {machines}")
    shell.say(f"code: commit {launched.checkout.version} of {launched.checkout.folder}")
    shell.say(
        job.cost(
            machines.devices,
            "GPU" if on_slurm else "chip",
            hours=arguments.hours,
            run=run,
            seconds=arguments.step_seconds,
        )
    )
    if isinstance(machines, slurm.Allocation):
        text = slurm.script(launched, machines, arguments.restarts)
        texts = launched.write(shell, {slurm.BATCH: text})
        slurm.submit(launched, shell)
        shell.say("queued; --action=follow shows the log, --action=delete ends it")
    elif arguments.engine in ("gke", "xpk"):
        texts = _run_on_gke(arguments, launched, machines, shell)
    else:
        texts = _run_on_vms(arguments, launched, machines, shell)
    if arguments.dry_run:
        for path, text in texts.items():
            print(f"\n==> {path} <==\n{text}", end="")


def _run_on_vms(
    arguments: argparse.Namespace, launched: "Job", slices: "Slices", shell: "Shell"
) -> dict[str, str]:
    from flix_jax.experiments.launch import gcloud
    from flix_jax.experiments.launch.shell import written

    request = gcloud.Request(
        slices,
        arguments.runtime or slices.kind.runtime,
        arguments.capacity or "on_demand",
        launched.labels,
        tuple(arguments.extra),
    )
    machines = _machines(arguments)
    machines.create(request)  # what cannot be made is refused before anything is done
    texts = launched.write(shell)
    launched.ship(shell)
    kept = True
    try:
        gcloud.launch(
            launched,
            machines,
            request,
            shell,
            restarts=arguments.restarts,
            detach=arguments.detach,
        )
        _finish(arguments, shell)
        kept = not arguments.delete
    finally:
        if kept:
            shell.say("machines that are there are kept, and charged for, until this deletes them:")
            shell.say(f"  {written(machines.delete())}")
    return texts


def _run_on_gke(
    arguments: argparse.Namespace, launched: "Job", slices: "Slices", shell: "Shell"
) -> dict[str, str]:
    from flix_jax.experiments.launch import gke

    cluster = _cluster(arguments)
    if arguments.engine == "xpk":
        create = gke.xpk_create(launched, slices, cluster, arguments.restarts)
        texts = launched.write(shell)
        shell.check(create)
    else:
        manifest = gke.to_yaml(gke.jobset(launched, slices, cluster, arguments.restarts))
        texts = launched.write(shell, {gke.MANIFEST: manifest})
        launched.ship(shell)
        gke.apply(os.path.join(launched.folder, gke.MANIFEST), cluster, shell)
    if not arguments.detach:
        gke.follow(arguments.name, shell)
    _finish(arguments, shell)
    return texts


def _finish(arguments: argparse.Namespace, shell: "Shell") -> None:
    """What was asked for after the run."""
    for action in ("fetch", "delete"):
        if getattr(arguments, action):
            _act(arguments, shell, action)


def _machines(arguments: argparse.Namespace) -> "Machines":
    from flix_jax.experiments.launch import gcloud

    queued = arguments.engine == "queued_resource"
    return gcloud.Machines(arguments.name, queued, arguments.zone, arguments.project)


def _cluster(arguments: argparse.Namespace) -> "Cluster":
    from flix_jax.experiments.launch import gke

    return gke.Cluster(
        arguments.cluster,
        arguments.zone,
        arguments.project,
        arguments.capacity or "on_demand",
        arguments.reservation,
        arguments.image or gke.IMAGE,
        arguments.service_account,
        tuple(arguments.extra),
    )


def _act(arguments: argparse.Namespace, shell: "Shell", action: str) -> None:
    """Follows, fetches or deletes what is there."""
    from flix_jax.experiments.launch import gcloud, gke, slurm

    engine = arguments.engine
    if action == "fetch":
        if arguments.fetch is None:
            raise UsageError("--action=fetch needs --fetch=DIR, the folder to copy to")
        gcloud.fetch(arguments.run_dir, arguments.fetch, shell)
    elif engine == "slurm":
        done = slurm.follow(arguments.launch_dir)
        shell.check(done if action == "follow" else slurm.delete(arguments.name))
    elif engine in ("gke", "xpk"):
        if action == "follow":
            gke.follow(arguments.name, shell)
        elif engine == "xpk":
            shell.check(gke.xpk_delete(arguments.name, _cluster(arguments)))
        else:
            shell.check(gke.delete(arguments.name))
    elif action == "delete":
        shell.check(_machines(arguments).delete())
    else:
        try:
            gcloud.follow(_machines(arguments), shell)
        except gcloud.Lost as lost:
            raise ValueError(f"{arguments.name}: {lost}") from None
