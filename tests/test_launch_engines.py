"""The commands of each engine, run against stand-ins that log them and play answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from launching import GIN, NOT_FOUND, STOCKOUT, make_checkout, make_stand_ins

from flix_jax import cli

SCHEMA = json.loads((Path(__file__).parent / "goldens" / "jobset.schema.json").read_text())
RUN = "gs://b/runs/x"
ON_VM = ("--engine=tpu_vm", "--accelerator=v4-128", "--zone=us-central2-b", "--project=p")
QUEUED = ("--engine=queued_resource", "--topology=v5e:16x16", "--zone=z")
READY = [0, "READY", ""]
PREEMPTED = [0, "PREEMPTED", ""]
ENDED = [0, "", ""]

# What starts a run on machines that are not there: state, made, state, install, start, follow.
FRESH = ["rsync", "describe", "create", "describe", "ssh-install", "ssh-start", "ssh-follow"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_stand_ins(tmp_path / "bin", monkeypatch)


@pytest.fixture
def launch(stand_ins, tmp_path, capfd):
    """Runs `flix launch`; returns its status, what it printed, and the verbs that were run."""
    commit = make_checkout(tmp_path / "code")

    def run(*flags, gin=GIN):
        common = [f"--code={tmp_path / 'code'}"] if gin else []
        argv = ["launch", *gin, f"--run_dir={RUN}", "--poll=0", *common, *flags]
        status = cli.main(argv)
        return status, *capfd.readouterr(), verbs(stand_ins)

    run.commit = commit
    return run


def verbs(stand_ins) -> list[str]:
    """The commands in a word each; of ssh, with what the workers' script is asked for."""
    words = []
    for argv in stand_ins.commands:
        known = ("rsync", "describe", "create", "delete", "apply", "logs", "get-credentials", "get")
        word = "ssh" if "ssh" in argv else next((w for w in argv if w in known), argv[0])
        if word == "ssh":
            action = re.findall(r"worker\.sh (\w+)", " ".join(argv))[-1]
            word = f"ssh-{action}"
        words.append(word)
    return words


# ------------------------------------------------------------------------------------ Cloud TPU VMs


def test_a_tpu_vm_is_made_set_up_followed_and_kept(launch, stand_ins, tmp_path):
    stand_ins.play(describe=[NOT_FOUND, [0, "CREATING", ""], [0, "CREATING", ""], READY])
    status, out, _, done = launch(*ON_VM, "--capacity=spot")
    assert status == 0
    assert done == [
        "rsync", "describe", "create", "describe", "describe", "describe",
        "ssh-install", "ssh-start", "ssh-follow",
    ]  # fmt: skip
    assert "delete" not in done
    assert "gcloud compute tpus tpu-vm delete flix-x --quiet --zone=us-central2-b" in out
    place = ["--zone=us-central2-b", "--project=p"]
    version = launch.commit[:12]
    create, install, follow = (stand_ins.commands[i] for i in (2, 6, 8))
    assert create == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "flix-x", "--accelerator-type=v4-128",
        "--version=tpu-ubuntu2204-base", "--spot",
        f"--labels=flix-run=flix-x,flix-commit={version}", *place,
    ]  # fmt: skip
    assert "--worker=all" in install and "--worker=0" in follow
    assert f"{RUN}/launch/{version} flix/flix-x" in " ".join(install)
    assert stand_ins.commands[0][-1] == f"{RUN}/launch/{version}"
    folder = tmp_path / "launches" / "flix-x"
    assert {path.name for path in folder.iterdir()} == {
        "worker.sh", "launch.json", "code.tar.gz",
    }  # fmt: skip


def test_a_stockout_is_one_line_and_leaves_nothing_to_delete(launch, stand_ins):
    stand_ins.play(describe=[NOT_FOUND], create=[STOCKOUT])
    status, _, error, done = launch(*ON_VM)
    assert status == cli.USER_ERROR
    assert done == ["rsync", "describe", "create"]
    assert error.splitlines()[-1] == (
        "error: gcloud compute tpus tpu-vm create flix-x: There is no more capacity in the zone "
        '"us-central2-b"; --engine=queued_resource waits for capacity'
    )


def test_a_preempted_run_ends_with_a_hint_when_no_restart_was_asked_for(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, PREEMPTED], follow=[], ssh=[ENDED, ENDED, [255, "", ""]]
    )
    status, _, error, done = launch(*ON_VM)
    assert status == cli.USER_ERROR
    assert done == [*FRESH, "describe"]
    assert "preempted (PREEMPTED), and no restart is left" in error.splitlines()[-1]


def test_a_preempted_run_starts_again_on_machines_that_are_made_again(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, PREEMPTED, PREEMPTED, READY],
        # install, start, follow that breaks; stop, install, start, follow that ends
        ssh=[ENDED, ENDED, [255, "", ""], ENDED, ENDED, ENDED, ENDED],
    )
    status, out, _, done = launch(*ON_VM, "--restarts=1")
    assert status == 0
    assert done == [
        *FRESH, "describe",  # it was preempted
        "describe", "delete", "create", "describe", "ssh-stop", *FRESH[-3:],
    ]  # fmt: skip
    assert done.count("delete") == 1  # of what was preempted; what ran to the end is kept
    creations = [argv for argv in stand_ins.commands if "create" in argv]
    assert creations[0] == creations[1]
    assert (
        "# the machines were preempted (PREEMPTED); starting again from the last checkpoint" in out
    )


def test_no_capacity_after_a_preemption_uses_a_restart_up(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, PREEMPTED, PREEMPTED, NOT_FOUND, READY],
        create=[ENDED, STOCKOUT, ENDED],
        ssh=[ENDED, ENDED, [255, "", ""]],
    )
    status, out, _, done = launch(*ON_VM, "--restarts=2")
    assert status == 0
    assert done.count("create") == 3 and done[-1] == "ssh-follow"
    assert "# no machines: There is no more capacity" in out and "(0 restarts left)" in out


def test_a_worker_that_was_restarted_is_started_again_without_new_machines(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, READY, READY],
        ssh=[ENDED, ENDED, [75, "", ""]],
    )
    status, _, _, done = launch(*ON_VM, "--restarts=1")
    assert status == 0
    assert done == [*FRESH, "describe", "describe", "ssh-stop", *FRESH[-3:]]


def test_a_lost_connection_is_made_again_and_a_failed_training_is_not(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, READY, READY],
        ssh=[ENDED, ENDED, [255, "", ""], [1, "diverged", ""], ENDED],
    )
    status, _, error, done = launch(*ON_VM, "--restarts=5", "--delete")
    assert status == cli.USER_ERROR
    assert done == [*FRESH, "describe", "ssh-follow", "describe", "ssh-lost"]
    assert "training failed on flix-x with status 1" in error.splitlines()[-1]


def test_training_that_fails_for_another_worker_was_restarted_is_started_again(launch, stand_ins):
    stand_ins.play(
        describe=[NOT_FOUND, READY, READY, READY],
        ssh=[ENDED, ENDED, [1, "a peer is gone", ""], [75, "", ""]],
    )
    status, _, _, done = launch(*ON_VM, "--restarts=1")
    assert status == 0
    assert done == [*FRESH, "describe", "ssh-lost", "describe", "ssh-stop", *FRESH[-3:]]


def test_an_installation_is_tried_three_times(launch, stand_ins):
    broken = [1, "", "no route to the package index"]
    stand_ins.play(describe=[NOT_FOUND, *[READY] * 4], ssh=[broken] * 3)
    status, _, error, done = launch(*ON_VM)
    assert status == cli.USER_ERROR
    assert done.count("ssh-install") == 3 and "ssh-start" not in done
    assert "3 times: no route to the package index" in error.splitlines()[-1]


def test_machines_that_are_there_are_used_and_preempted_ones_are_not_deleted_unasked(
    launch, stand_ins
):
    stand_ins.play(describe=[READY])
    assert launch(*ON_VM)[3] == ["rsync", "describe", *FRESH[-3:]]
    stand_ins.play(describe=[PREEMPTED])
    status, _, error, done = launch(*ON_VM)
    assert status == cli.USER_ERROR and done == ["rsync", "describe"]
    assert "flix-x is there and PREEMPTED: delete it (--action=delete)" in error


def test_an_api_that_does_not_answer_is_not_taken_for_missing_machines(launch, stand_ins):
    denied = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) PERMISSION_DENIED: no"]
    stand_ins.play(describe=[denied])
    status, _, error, done = launch(*ON_VM)
    assert (status, done) == (cli.USER_ERROR, ["rsync", "describe"])
    assert error.splitlines()[-1] == (
        "error: gcloud compute tpus tpu-vm describe flix-x: PERMISSION_DENIED: no"
    )


def test_results_are_fetched_and_machines_deleted_where_that_is_asked_for(launch, stand_ins):
    stand_ins.play(describe=[NOT_FOUND, READY])
    status, out, _, done = launch(*ON_VM, "--fetch=results", "--delete")
    assert status == 0
    assert done == [*FRESH, "rsync", "delete"]
    assert "are kept" not in out
    assert Path("results").is_dir()
    exclude = next(word for word in stand_ins.commands[-2] if word.startswith("--exclude="))
    pattern = re.compile(exclude.removeprefix("--exclude="))
    for name in ("checkpoints/100/x", "launch/abc/code.tar.gz", "bases/a/config.gin"):
        assert pattern.match(name)
    for name in ("scores.md", "evaluations/100/ner/sw.jsonl", "config.gin"):
        assert not pattern.match(name)


def test_detached_it_returns_when_training_has_started(launch, stand_ins):
    stand_ins.play(describe=[NOT_FOUND, READY])
    assert launch(*ON_VM, "--detach")[3] == FRESH[:-1]


@pytest.mark.parametrize(
    "action, wanted", [("follow", "ssh-follow"), ("delete", "delete"), ("fetch", "rsync")]
)
def test_actions_need_neither_gin_files_nor_the_accelerator(launch, stand_ins, action, wanted):
    more = ["--fetch=there"] if action == "fetch" else []
    flags = ("--engine=tpu_vm", "--zone=z", f"--action={action}", *more)
    status, _, _, done = launch(*flags, gin=())
    assert (status, done) == (0, [wanted])


# --------------------------------------------------------------------------------- queued resources


def test_a_queued_resource_is_waited_for_through_its_states(launch, stand_ins):
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    stand_ins.play(describe=[NOT_FOUND, *([0, state, ""] for state in states)])
    status, out, _, done = launch(*QUEUED, "--capacity=reserved")
    assert status == 0
    assert done == [*FRESH[:3], *["describe"] * 4, *FRESH[-3:]]
    assert out.count("# flix-x: WAITING_FOR_RESOURCES") == 1
    assert out.count("# flix-x: PROVISIONING") == 1
    create = stand_ins.commands[2]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "flix-x"]
    assert create[6:10] == [
        "--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=flix-x", "--reserved",
    ]  # fmt: skip
    assert {"--worker=all", "--node=all"} < set(stand_ins.commands[-2])
    assert {"--worker=0", "--node=0"} < set(stand_ins.commands[-1])


def test_several_slices_are_nodes_of_one_queued_resource(launch, stand_ins):
    stand_ins.play(describe=[NOT_FOUND, [0, "ACTIVE", ""]])
    assert launch(*QUEUED, "--slices=4")[0] == 0
    assert {"--node-count=4", "--node-prefix=flix-x"} < set(stand_ins.commands[2])
    assert not [word for word in stand_ins.commands[2] if word.startswith("--node-id")]


def test_an_unusual_shape_is_asked_for_by_its_shape(launch, stand_ins):
    stand_ins.play(describe=[NOT_FOUND, [0, "ACTIVE", ""]])
    assert launch("--engine=queued_resource", "--topology=v4:4x4x16", "--zone=z")[0] == 0
    create = stand_ins.commands[2]
    assert create[6:8] == ["--type=v4", "--topology=4x4x16"]


def test_a_queued_resource_that_fails_says_why(launch, stand_ins):
    why = "failedData={'error': {'message': 'no quota'}};state=FAILED"
    stand_ins.play(describe=[NOT_FOUND, [0, "FAILED", ""], [0, why, ""]])
    status, _, error, done = launch(*QUEUED)
    assert status == cli.USER_ERROR
    assert "flix-x is FAILED: " in error and "no quota" in error.splitlines()[-1]
    assert "delete" not in done


def test_a_suspended_queued_resource_is_deleted_with_its_nodes_and_asked_for_again(
    launch, stand_ins
):
    stand_ins.play(
        describe=[
            NOT_FOUND, [0, "ACTIVE", ""], [0, "SUSPENDING", ""], [0, "SUSPENDING", ""],
            [0, "SUSPENDED", ""], [0, "ACTIVE", ""],
        ],
        ssh=[ENDED, ENDED, [255, "", ""]],
    )  # fmt: skip
    status, _, _, done = launch(*QUEUED, "--restarts=1")
    assert status == 0
    assert done == [
        *FRESH, *["describe"] * 3, "delete", "create", "describe", "ssh-stop", *FRESH[-3:],
    ]  # fmt: skip
    assert "--force" in next(argv for argv in stand_ins.commands if "delete" in argv)


# ---------------------------------------------------------------------------------------------- GKE


def manifest(out: str) -> dict:
    return yaml.safe_load(out.split("jobset.yaml <==\n")[1])


GKE = (
    [
        (["--topology=v5e:16x16"], "tpu-v5-lite-podslice", "16x16", 4, 64, 1),
        (["--accelerator=v5litepod-8"], "tpu-v5-lite-podslice", "2x4", 8, 1, 1),
        (["--topology=v6e:4x4*3", "--capacity=spot"], "tpu-v6e-slice", "4x4", 4, 4, 3),
        (["--accelerator=v4-128"], "tpu-v4-podslice", "4x4x4", 4, 16, 1),
        (
            ["--topology=v5p:4x4x8", "--capacity=reserved", "--reservation=mine"],
            "tpu-v5p-slice", "4x4x8", 4, 32, 1,
        ),
    ]
)  # fmt: skip


@pytest.mark.parametrize("flags, accelerator, topology, chips, hosts, slices", GKE)
def test_a_jobset_is_of_the_schema_and_asks_for_the_slice(
    flags, accelerator, topology, chips, hosts, slices, launch, stand_ins
):
    engine = ("--engine=gke", "--service_account=trainer", "--restarts=7", "--dry_run")
    status, out, _, done = launch(*engine, *flags)
    assert (status, done) == (0, [])
    made = manifest(out)
    jsonschema.validate(made, SCHEMA, jsonschema.Draft7Validator)
    (job,) = made["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert ("cloud.google.com/gke-spot" in selector) == ("--capacity=spot" in flags)
    assert selector.get("cloud.google.com/reservation-name", "") in "".join(flags)
    amounts = pod["containers"][0]["resources"]
    assert amounts["limits"] == amounts["requests"] == {"google.com/tpu": chips}
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == hosts
    assert job["replicas"] == slices
    assert made["spec"]["failurePolicy"] == {"maxRestarts": 7}
    assert pod["serviceAccountName"] == "trainer"


def test_the_schema_refuses_what_kubernetes_would(launch):
    out = launch("--engine=gke", "--topology=v5e:4x4", "--dry_run")[1]
    for break_it in (
        lambda m: m["spec"].update(maxRestarts=3),
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"),
        lambda m: m["spec"]["replicatedJobs"][0].pop("name"),
        lambda m: m["metadata"].update(name="Mine"),
    ):
        made = manifest(out)
        break_it(made)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(made, SCHEMA, jsonschema.Draft7Validator)


def test_a_jobset_is_applied_followed_and_deleted_on_request(launch, stand_ins, tmp_path):
    running = [0, "", ""]
    stand_ins.play(get=[running, [0, "Completed", ""]])
    flags = ("--engine=gke", "--topology=v5e:4x4", "--cluster=c", "--zone=us-west4")
    status, _, _, done = launch(*flags, "--delete")
    assert status == 0
    assert done == ["rsync", "get-credentials", "apply", "logs", "get", "logs", "get", "delete"]
    applied = tmp_path / "launches" / "flix-x" / "jobset.yaml"
    assert stand_ins.commands[2] == ["kubectl", "apply", "--filename=launches/flix-x/jobset.yaml"]
    jsonschema.validate(yaml.safe_load(applied.read_text()), SCHEMA)
    assert stand_ins.commands[-1] == ["kubectl", "delete", "jobset", "flix-x"]


def test_a_jobset_that_fails_is_one_line_and_is_kept(launch, stand_ins):
    stand_ins.play(get=[[0, "Failed", ""]])
    status, _, error, done = launch("--engine=gke", "--topology=v5e:4x4", "--delete")
    assert (status, done) == (cli.USER_ERROR, ["rsync", "apply", "logs", "get"])
    assert "JobSet flix-x: Failed" in error.splitlines()[-1]


def test_xpk_makes_an_image_of_the_launched_folder(launch, stand_ins):
    stand_ins.play(get=[[0, "Completed", ""]])
    flags = ("--engine=xpk", "--cluster=c", "--zone=z", "--restarts=2", "--capacity=spot")
    status, _, _, done = launch(*flags, "--topology=v5e:16x16*2", "--delete")
    assert (status, done) == (0, ["create", "logs", "get", "delete"])
    create = stand_ins.commands[0]
    assert create[:3] == ["xpk", "workload", "create"]
    assert {
        "--workload=flix-x", "--cluster=c", "--zone=z", "--tpu-type=v5litepod-256",
        "--num-slices=2", "--spot", "--max-restarts=2", "--script-dir=launches/flix-x",
        "--command=bash worker.sh install && bash worker.sh train",
    } < set(create)  # fmt: skip


# -------------------------------------------------------------------------------------------- SLURM


def test_a_batch_script_is_queued_and_checked(launch, stand_ins, tmp_path):
    flags = ("--engine=slurm", "--nodes=4", "--gpus_per_node=8", "--extra=--partition=a100")
    status, out, _, done = launch(*flags, "--restarts=3", "--run_dir=runs/here")
    assert (status, done) == (0, ["sbatch"])
    assert "32 GPUs" in out
    path = tmp_path / "launches" / "flix-here" / "job.sbatch"
    assert stand_ins.commands[0] == ["sbatch", str(path.relative_to(tmp_path))]
    text = path.read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {
        "--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--requeue", "--partition=a100",
    } < set(options)  # fmt: skip
    # sbatch reads options up to the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo")
    check = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([check, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"--run_dir={tmp_path / 'runs' / 'here'}" in (path.parent / "worker.sh").read_text()


@pytest.mark.parametrize("restarted, status", [("3", 0), ("4", 1)])
def test_a_batch_script_goes_on_while_restarts_are_left(
    restarted, status, launch, stand_ins, tmp_path, monkeypatch
):
    launch("--engine=slurm", "--restarts=3", "--run_dir=runs/here")
    folder = tmp_path / "launches" / "flix-here"
    (folder / "worker.sh").write_text("echo $1\n")
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/usr/bin/env bash\n"$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarted)
    done = subprocess.run(["bash", folder / "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.split() == (["install", "train"] if status == 0 else [])


@pytest.mark.parametrize("trained", [0, 2, 75])
def test_a_batch_script_that_was_asked_to_stop_queues_itself_again(
    trained, launch, stand_ins, tmp_path, monkeypatch
):
    launch("--engine=slurm", "--restarts=3", "--run_dir=runs/here", "--grace_seconds=40")
    folder = tmp_path / "launches" / "flix-here"
    assert " --grace_seconds=40 " in (folder / "worker.sh").read_text()
    (folder / "worker.sh").write_text("true\n")
    for name, text in (("srun", f"exit {trained}"), ("scontrol", "echo $*")):
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    done = subprocess.run(["bash", folder / "job.sbatch"], capture_output=True, text=True)
    assert done.returncode == trained
    assert done.stdout == ("requeue 17\n" if trained == 75 else "")


# ------------------------------------------------------------------------------------- a dry run


ENGINES = (
    (*ON_VM, "--delete", "--fetch=there"),
    (*QUEUED, "--slices=2"),
    ("--engine=gke", "--topology=v5e:4x4", "--cluster=c", "--zone=z"),
    ("--engine=xpk", "--topology=v5e:4x4", "--cluster=c", "--zone=z"),
    ("--engine=slurm",),
)


@pytest.mark.parametrize("flags", ENGINES, ids=lambda flags: flags[0])
def test_a_dry_run_shows_exactly_the_commands_that_run(flags, launch, stand_ins, tmp_path):
    status, out, _, done = launch(*flags, "--dry_run")
    assert (status, done) == (0, [])
    assert not (tmp_path / "launches").exists()
    script = "\n".join(line for line in out.split("\n==> ")[0].splitlines() if line[:1] != "#")
    stand_ins.play(
        describe=[NOT_FOUND, [0, "READY", ""], [0, "ACTIVE", ""]], get=[[0, "Completed", ""]]
    )
    assert launch(*flags)[0] == 0
    run = stand_ins.commands
    stand_ins.play()
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stand_ins.commands == run


def test_a_program_that_is_not_here_is_named(launch, monkeypatch, tmp_path):
    (tmp_path / "only").mkdir()
    for name in ("git", "bash"):
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        (tmp_path / "only" / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "only"))
    status, _, error, _ = launch(*ON_VM)
    assert status == cli.USER_ERROR
    assert (
        error == "error: gcloud is not installed here: https://cloud.google.com/sdk/docs/install\n"
    )
