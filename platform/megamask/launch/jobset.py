"""A job as a Kubernetes JobSet: one pod a node, the node wrapper as PID 1, and the exit-code contract as its rules.

Every pod leaves with the job's one code. A rule of the Job turns each code of the contract, and an eviction, into a
named failure; a rule of the JobSet turns that into stop, a free restart, or a counted one (no rule matches).
Reference: JobSet v1alpha2, jobset.sigs.k8s.io.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamask.launch.job import COUNTED_CODES, FREE_CODES, RENDEZVOUS_PORT, STOP_CODES, Job, SecretKey

CONFIG_FOLDER = "/etc/megamask"
CONFIG_NAME = "config.yaml"
CONTAINER = "node"  # the name under which Kubeflow Trainer fills in the container, too
REPLICATED_JOB = "node"
_LABEL = "jobset.sigs.k8s.io"


def render(job: Job) -> list[dict[str, Any]]:
    """Return the objects of a job: the ConfigMap with its config, and the JobSet."""
    return [config_map(job), jobset(with_mounted_config(job))]


def with_mounted_config(job: Job) -> Job:
    """Return the job as its pods start it: with the composed config, which the ConfigMap brings."""
    return replace(job, config=f"{CONFIG_FOLDER}/{CONFIG_NAME}", overrides=())


def config_map(job: Job) -> dict[str, Any]:
    """Return the ConfigMap that brings the composed config to the pods."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-config", "namespace": job.kubernetes.namespace},
        "data": {CONFIG_NAME: job.config_text},
    }


def jobset(job: Job) -> dict[str, Any]:
    """Return the JobSet."""
    options = job.kubernetes
    metadata: dict[str, Any] = {"name": job.name, "namespace": options.namespace}
    spec: dict[str, Any] = {}
    if options.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options.queue}
        if options.priority_class is not None:
            metadata["labels"]["kueue.x-k8s.io/priority-class"] = options.priority_class
        spec["suspend"] = True
    spec |= {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job.name},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [REPLICATED_JOB]},
        "failurePolicy": _failure_policy(job.max_restarts),
        "replicatedJobs": [{"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": _indexed_job(job)}}],
    }
    return {"apiVersion": f"{_LABEL.replace('sigs.k8s', 'x-k8s')}/v1alpha2", "kind": "JobSet", "metadata": metadata} | {
        "spec": spec
    }


def _failure_policy(max_restarts: int) -> dict[str, Any]:
    """First match wins; a failure that no rule names is a counted restart: bugs, hardware, hangs, storage, signals."""
    stop, free = ("|".join(map(str, codes)) for codes in (STOP_CODES, FREE_CODES))
    # The message of a failed Job ends in "... exit code 75 matching FailJob rule at index 1"; the patterns are
    # searched without anchors, so "matching" keeps 2 from matching in 127.
    rules = (
        ("stop", "FailJobSet", [f"failed with exit code ({stop}) matching"]),
        (
            "preempted",
            "RestartJobSetAndIgnoreMaxRestarts",
            ["has condition DisruptionTarget matching", f"failed with exit code ({free}) matching"],
        ),
    )
    return {
        "maxRestarts": max_restarts,
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": name,
                "action": action,
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": patterns,
            }
            for name, action, patterns in rules
        ],
    }


def _indexed_job(job: Job) -> dict[str, Any]:
    codes = sorted({*STOP_CODES, *COUNTED_CODES, *FREE_CODES})  # the controller wants them ascending
    return {
        "completionMode": "Indexed",
        "parallelism": job.nodes,
        "completions": job.nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes},
                },
            ]
        },
        "template": pod_template(job),
    }


def pod_template(job: Job) -> dict[str, Any]:
    """Return the template of a node's pod; the runtime of a TrainJob uses it, too."""
    options = job.kubernetes
    topology = {
        f"kueue.x-k8s.io/podset-{kind}-topology": label
        for kind, label in (("required", options.required_topology), ("preferred", options.preferred_topology))
        if label is not None
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.notice_s,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.run_as,
            "runAsGroup": options.run_as,
            "fsGroup": options.run_as,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job)],
        "volumes": _volumes(job),
    }
    optional = {
        "priorityClassName": options.priority_class,
        "serviceAccountName": options.service_account,
        "nodeSelector": dict(options.node_selector) or None,
        "tolerations": [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in options.tolerations]
        or None,
    }
    spec |= {name: value for name, value in optional.items() if value is not None}
    metadata: dict[str, Any] = {"labels": {"app.kubernetes.io/name": "megamask", "megamask/job": job.name}}
    if topology:
        metadata["annotations"] = topology
    return {"metadata": metadata, "spec": spec}


def _container(job: Job) -> dict[str, Any]:
    capabilities: dict[str, Any] = {"drop": ["ALL"]}
    if job.kubernetes.rdma_resource is not None:
        capabilities["add"] = ["IPC_LOCK"]  # registered memory
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": list(job.command),
        "ports": [{"name": "rendezvous", "containerPort": RENDEZVOUS_PORT}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": _environment(job),
        "resources": {"requests": _resources(job), "limits": _resources(job)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            *({"name": claim, "mountPath": path} for claim, path in sorted(job.kubernetes.claims.items())),
        ],
    }
    if job.workdir is not None:
        container["workingDir"] = job.workdir
    return container


def _environment(job: Job) -> list[dict[str, Any]]:
    def label(name: str) -> dict[str, Any]:
        return {"fieldRef": {"fieldPath": f"metadata.labels['{_LABEL}/{name}']"}}

    entries: list[dict[str, Any]] = [
        {"name": "MASTER_ADDR", "value": f"{job.name}-{REPLICATED_JOB}-0-0.{job.name}"},
        {"name": "MASTER_PORT", "value": str(RENDEZVOUS_PORT)},
        {"name": "MEGAMASK_NUM_NODES", "value": str(job.nodes)},
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": "JOBSET_UID", "valueFrom": label("jobset-uid")},
        {"name": "JOBSET_RESTART_ATTEMPT", "valueFrom": label("restart-attempt")},
        {"name": "MEGAMASK_LAUNCH_TOKEN", "value": "jobset-$(JOBSET_UID).$(JOBSET_RESTART_ATTEMPT)"},
        {"name": "HOME", "value": "/tmp"},  # a user id without an entry in passwd has none
        {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
    ]
    entries += [{"name": name, "value": value} for name, value in sorted(job.environment.items())]
    for name, secret in sorted(job.secrets.items()):
        if isinstance(secret, SecretKey):
            reference = {"secretKeyRef": {"name": secret.secret, "key": secret.key}}
            entries.append({"name": name, "valueFrom": reference})
    return entries


def _resources(job: Job) -> dict[str, str]:
    """Requests, which equal the limits, so that no pod is throttled or evicted for what it was promised."""
    options = job.kubernetes
    resources = {"cpu": str(job.cpus_per_node), "ephemeral-storage": f"{options.tmp_gib}Gi"}
    if job.memory_gib is not None:
        resources["memory"] = f"{job.memory_gib}Gi"
    if job.gpus_per_node:
        resources[options.gpu_resource] = str(job.gpus_per_node)
        if options.rdma_resource is not None:
            resources[options.rdma_resource] = str(job.gpus_per_node)
    return resources


def _volumes(job: Job) -> list[dict[str, Any]]:
    options = job.kubernetes
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shm_gib}Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{options.tmp_gib}Gi"}},
        {"name": "config", "configMap": {"name": f"{job.name}-config"}},
        *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in sorted(options.claims)),
    ]
