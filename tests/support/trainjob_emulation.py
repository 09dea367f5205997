"""The JobSet that Kubeflow Trainer makes of a TrainJob and its runtime: an emulation of its controller, not the real.

Followed: the runtime's template, runtimePatches (lists of named entries are merged by name, as in a strategic merge),
the trainer's nodes, image, command, variables and resources in the container `node`, and the JobSet's own name as its
subdomain. Not followed: initializers, suspension, and the variables of torchrun (the runtime's policy sets none).
"""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]


def jobset_of(trainjob: Object, runtime: Object) -> Object:
    """Return the JobSet of a TrainJob under a ClusterTrainingRuntime."""
    reference = trainjob["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
    for patch in trainjob["spec"]["runtimePatches"]:
        spec = _merged(spec, patch["trainingRuntimeSpec"]["template"]["spec"])
    [replicated] = [entry for entry in spec["replicatedJobs"] if _is_trainer(entry)]
    job, trainer = replicated["template"]["spec"], trainjob["spec"]["trainer"]
    job["parallelism"] = job["completions"] = trainer["numNodes"]
    [container] = [entry for entry in job["template"]["spec"]["containers"] if entry["name"] == "node"]
    container |= {name: trainer[name] for name in ("image", "command")}
    container["resources"] = trainer["resourcesPerNode"]
    container["env"] = _merged(container.get("env", []), trainer["env"])
    name = trainjob["metadata"]["name"]
    spec["network"].setdefault("subdomain", name)
    metadata = {"name": name, "namespace": trainjob["metadata"]["namespace"]}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}


def _is_trainer(replicated: Object) -> bool:
    labels = replicated["template"]["metadata"]["labels"]
    return bool(labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer")


def _merged(old: Any, new: Any) -> Any:
    """A strategic merge: objects by key, lists of named entries by name; all else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {
            key: _merged(old[key], value) if key in old else copy.deepcopy(value) for key, value in new.items()
        }
    if isinstance(old, list) and isinstance(new, list) and all(_is_named(entry) for entry in [*old, *new]):
        by_name = {entry["name"]: entry for entry in old}
        for entry in new:
            by_name[entry["name"]] = _merged(by_name.get(entry["name"], {}), entry)
        return list(by_name.values())
    return copy.deepcopy(new)


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and "name" in entry
