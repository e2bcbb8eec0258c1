"""GKE: a JobSet for kubectl, or the xpk command that makes one."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from flix_jax.experiments.launch.accelerators import Slices
from flix_jax.experiments.launch.job import Job
from flix_jax.experiments.launch.shell import Shell
from flix_jax.experiments.launch.worker import SCRIPT

MANIFEST = "jobset.yaml"
REPLICATED = "slice"  # the replicated job: one job a slice, one pod a host

#: Has gcloud, which copies the launched folder from the bucket, and Google's credentials.
FETCHING_IMAGE = "gcr.io/google.com/cloudsdktool/google-cloud-cli:slim"
#: Where training is installed, with pip and a Python of 3.11 or newer.
IMAGE = "python:3.11"

# Of the TPU runtime, and of jax.distributed's coordinator on several slices.
PORTS = (8471, 8080, 8476)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where pods run, and how.

    Attributes:
      name: of the GKE cluster; kubectl's current context is used without one.
      zone, project: of the cluster.
      capacity: 'on_demand', 'spot' or 'reserved'.
      reservation: the name of reserved capacity.
      image: of the container that trains.
      service_account: of Kubernetes, which may read and write the bucket; None is the default one.
      extra: further flags of `kubectl apply`, or of `xpk workload create`.
    """

    name: str | None = None
    zone: str | None = None
    project: str | None = None
    capacity: str = "on_demand"
    reservation: str | None = None
    image: str = IMAGE
    service_account: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.capacity == "reserved") != (self.reservation is not None):
            raise ValueError(
                "--capacity=reserved and --reservation=NAME go together: nodes of GKE are chosen "
                "by the reservation's name"
            )
        if self.name is not None and self.zone is None:
            raise ValueError(f"--cluster={self.name} needs --zone, its zone or region")


def jobset(job: Job, slices: Slices, cluster: Cluster, restarts: int) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) that trains `job`: a job a slice, a pod a host.

    If a pod fails, all of them are made again, at most `restarts` times, and the run goes on from
    its last checkpoint.

    Raises:
      ValueError: GKE has no such slices, or the shape of the slice is not known.
    """
    kind = slices.kind
    if kind.gke is None:
        raise ValueError(f"--engine=gke has no {slices.name}; --engine=tpu_vm does")
    if not slices.shape:
        raise ValueError(
            f"--accelerator={slices.accelerator_type}: GKE asks for its shape; give "
            f"--topology={slices.name}:AxBxC"
        )
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind.gke,
        "cloud.google.com/gke-tpu-topology": slices.shape,
    }
    tolerations = []
    if cluster.capacity == "spot":
        key = "cloud.google.com/gke-spot"
        selector[key] = "true"
        tolerations = [{"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if cluster.reservation:
        selector["cloud.google.com/reservation-name"] = cluster.reservation
    mounts = [{"name": "flix", "mountPath": "/flix"}]
    copy = ["gcloud", "storage", "rsync", "--recursive", job.bucket, "/flix"]
    train = f"bash /flix/{SCRIPT} install && exec bash /flix/{SCRIPT} train"
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # The TPU hosts talk over the nodes' own network.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "initContainers": [
            {"name": "fetch", "image": FETCHING_IMAGE, "command": copy, "volumeMounts": mounts}
        ],
        "containers": [
            {
                "name": "train",
                "image": cluster.image,
                "command": ["bash", "-c", train],
                "env": [{"name": "FLIX_COMMIT", "value": job.checkout.version}],
                "ports": [{"containerPort": port} for port in PORTS],
                "resources": {
                    amount: {"google.com/tpu": slices.chips_per_host}
                    for amount in ("requests", "limits")
                },
                "securityContext": {"privileged": True},
                "volumeMounts": mounts,
            }
        ],
        "volumes": [{"name": "flix", "emptyDir": {}}],
    }
    if tolerations:
        pod["tolerations"] = tolerations
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "labels": job.labels,
            # A slice is a node pool; its pods must not be mixed with another's.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": restarts},
            "replicatedJobs": [
                {
                    "name": REPLICATED,
                    "replicas": slices.count,
                    "template": {
                        "spec": {
                            "parallelism": slices.hosts,
                            "completions": slices.hosts,
                            "backoffLimit": 0,
                            "template": {"metadata": {"labels": job.labels}, "spec": pod},
                        }
                    },
                }
            ],
        },
    }


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice, rather than once with a reference to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(manifest: dict[str, Any]) -> str:
    """A manifest as a file for kubectl."""
    return yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=100)


def apply(path: str, cluster: Cluster, shell: Shell) -> None:
    """Makes the JobSet of a file."""
    if cluster.name:
        place = [f"--location={cluster.zone}", *_project(cluster)]
        shell.check(["gcloud", "container", "clusters", "get-credentials", cluster.name, *place])
    shell.check(["kubectl", "apply", f"--filename={path}", *cluster.extra])


def follow(name: str, shell: Shell) -> None:
    """Shows the log of the first pod until the JobSet ends.

    Raises:
      ValueError: it failed; what it says of that.
    """
    first = f"jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0"
    first += ",batch.kubernetes.io/job-completion-index=0"
    log = ["kubectl", "logs", f"--selector={first}", "--all-containers", "--follow"]
    state = ["kubectl", "get", "jobset", name, "--output=jsonpath={.status.terminalState}"]
    ended = ""
    while not ended:
        shell.run([*log, "--tail=-1"])  # fails where no pod has started yet
        shell.wait()
        ended = shell.check(state, quiet=True, assumed="Completed")
    if ended != "Completed":
        raise ValueError(f"JobSet {name}: {ended}; see its log above and kubectl describe")


def delete(name: str) -> list[str]:
    """The command that deletes the JobSet and with it its pods."""
    return ["kubectl", "delete", "jobset", name]


def xpk_create(job: Job, slices: Slices, cluster: Cluster, restarts: int) -> list[str]:
    """The xpk command that makes an image of the launched folder and trains in it.

    Raises:
      ValueError: without a cluster.
    """
    shaped = f"{slices.kind.prefix}-{slices.shape}"
    tpu = slices.accelerator_type if slices.usual else shaped
    capacity = {
        "on_demand": "--on-demand",
        "spot": "--spot",
        "reserved": f"--reservation={cluster.reservation}",
    }[cluster.capacity]
    return [
        *_xpk("create", job.name, cluster),
        f"--tpu-type={tpu}",
        f"--num-slices={slices.count}",
        capacity,
        f"--max-restarts={restarts}",
        f"--base-docker-image={cluster.image}",
        f"--script-dir={job.folder}",
        f"--env=FLIX_COMMIT={job.checkout.version}",
        *cluster.extra,
        f"--command=bash {SCRIPT} install && bash {SCRIPT} train",
    ]


def xpk_delete(name: str, cluster: Cluster) -> list[str]:
    """The xpk command that deletes a workload, without a question."""
    return [*_xpk("delete", name, cluster), "--force"]


def _xpk(action: str, name: str, cluster: Cluster) -> list[str]:
    if cluster.name is None:
        raise ValueError("--engine=xpk needs --cluster")
    place = [f"--cluster={cluster.name}", f"--zone={cluster.zone}", *_project(cluster)]
    return ["xpk", "workload", action, f"--workload={name}", *place]


def _project(cluster: Cluster) -> list[str]:
    return [f"--project={cluster.project}"] if cluster.project else []
