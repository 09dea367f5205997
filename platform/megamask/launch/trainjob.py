"""A job as a TrainJob of Kubeflow Trainer, and the ClusterTrainingRuntime that it needs.

A TrainJob has no failure policy: the exit-code contract sits in the runtime's JobSet template, which an administrator
installs once. What belongs to one job (its config, claims, nodes, grace period) the TrainJob brings as a patch.
Reference: Kubeflow Trainer v1alpha1, trainer.kubeflow.org, runtime patches.
"""

from __future__ import annotations

from typing import Any

from megamask.launch.job import Job
from megamask.launch.jobset import CONTAINER, REPLICATED_JOB, config_map, jobset, with_mounted_config

_API = "trainer.kubeflow.org/v1alpha1"
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
_MANAGER = "megamask/launch"
# What a patch may set of a pod, of what the renderer writes.
_PATCHED = ("terminationGracePeriodSeconds", "securityContext", "serviceAccountName", "nodeSelector", "tolerations")


def render(job: Job) -> list[dict[str, Any]]:
    """Return the objects of a job: the ConfigMap with its config, and the TrainJob."""
    return [config_map(job), trainjob(with_mounted_config(job))]


def trainjob(job: Job) -> dict[str, Any]:
    """Return the TrainJob."""
    template = _pod_template(job)
    container = _container(template)
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
        "runtimePatches": [_patch(template, container)],
    }
    if job.kubernetes.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.kubernetes.queue}
        spec["suspend"] = True
    return {"apiVersion": _API, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def runtime(name: str) -> dict[str, Any]:
    """Return the ClusterTrainingRuntime: what all jobs have in common, without nodes, image, command and volumes."""
    job = Job(name="job", nodes=1, ranks_per_node=1, config="", run_dir="")
    template = jobset(job)["spec"]
    template["network"].pop("subdomain")  # a JobSet's default is its own name, which is the TrainJob's
    (replicated,) = template["replicatedJobs"]
    replicated["template"]["metadata"] = {"labels": {_ANCESTOR: "trainer"}}
    pod_template = replicated["template"]["spec"]["template"]
    pod_template["metadata"] = {"labels": {"app.kubernetes.io/name": "megamask"}}
    pod_template["spec"].pop("volumes")
    container = _container(pod_template)
    for key in ("image", "command", "env", "resources", "volumeMounts"):  # a TrainJob brings its own
        container.pop(key)
    container["image"] = f"{name}.invalid/brought-by-the-trainjob@sha256:{'0' * 64}"  # a pod template must have one
    return {
        "apiVersion": _API,
        "kind": "ClusterTrainingRuntime",
        "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": 1}, "template": {"spec": template}},
    }


def _patch(template: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
    pod = template["spec"]
    spec = {key: pod[key] for key in _PATCHED if key in pod}
    spec["volumes"] = pod["volumes"]
    spec["containers"] = [{key: container[key] for key in ("name", "securityContext", "volumeMounts")}]
    job_template = {"spec": {"template": {"metadata": template["metadata"], "spec": spec}}}
    replicated = [{"name": REPLICATED_JOB, "template": job_template}]
    return {"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": replicated}}}}


def _pod_template(job: Job) -> dict[str, Any]:
    (replicated,) = jobset(job)["spec"]["replicatedJobs"]
    template: dict[str, Any] = replicated["template"]["spec"]["template"]
    return template


def _container(pod_template: dict[str, Any]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = pod_template["spec"]["containers"]
    return next(container for container in containers if container["name"] == CONTAINER)
