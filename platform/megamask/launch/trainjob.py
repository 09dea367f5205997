"""A job as a TrainJob of Kubeflow Trainer, and the ClusterTrainingRuntime that it needs.

A TrainJob has no failure policy and no volumes of its own: the exit-code contract and the claims sit in the runtime's
JobSet template, which an administrator installs once. So the config has to lie on a claim that the runtime mounts.
Reference: Kubeflow Trainer v1alpha1, trainer.kubeflow.org.
"""

from __future__ import annotations

from typing import Any

from megamask.launch.job import Job
from megamask.launch.jobset import CONTAINER, jobset

_API = "trainer.kubeflow.org/v1alpha1"
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


def render(job: Job) -> list[dict[str, Any]]:
    """Return the objects of a job: the TrainJob."""
    return [trainjob(job)]


def trainjob(job: Job) -> dict[str, Any]:
    """Return the TrainJob."""
    container = _trainer_container(job)
    metadata: dict[str, Any] = {"name": job.name, "namespace": job.kubernetes.namespace}
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": job.kubernetes.runtime,
        },
        "trainer": {
            "numNodes": job.nodes,
            "image": job.image,
            "command": list(job.command),
            "env": container["env"],
            "resourcesPerNode": container["resources"],
        },
    }
    if job.kubernetes.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.kubernetes.queue}
        spec["suspend"] = True
    return {"apiVersion": _API, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def runtime(job: Job) -> dict[str, Any]:
    """Return the ClusterTrainingRuntime: the JobSet of a job without its number of nodes, image and command."""
    template = jobset(job)["spec"]
    template.pop("suspend", None)
    template["network"].pop("subdomain")  # a JobSet's default is its own name, which is the TrainJob's
    (replicated,) = template["replicatedJobs"]
    replicated["template"]["metadata"] = {"labels": {_ANCESTOR: "trainer"}}
    pod = replicated["template"]["spec"]["template"]["spec"]
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
    (container,) = pod["containers"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "config"]
    container["env"] = []  # a TrainJob brings its own
    return {
        "apiVersion": _API,
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": job.kubernetes.runtime},
        "spec": {
            "mlPolicy": {"numNodes": job.nodes},
            "template": {"spec": template},
        },
    }


def _trainer_container(job: Job) -> dict[str, Any]:
    (replicated,) = jobset(job)["spec"]["replicatedJobs"]
    containers: list[dict[str, Any]] = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return next(container for container in containers if container["name"] == CONTAINER)
