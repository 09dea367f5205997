"""Checks of rendered Kubernetes objects that no schema makes.

The controllers accept each of these and fail later, or not at all: a Job with exit codes out of order, a message
pattern that is not a regular expression (it then never matches), a pod whose name grows past 63 characters, a mount
without a volume, a grace period shorter than the save that it is for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megamask.config.rules.launch import SECRET_VARIABLE

_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_MAX_CHARACTERS = 63
_RANDOM_SUFFIX = len("-abcde")
_NOT_SECRET = frozenset({"MEGAMASK_LAUNCH_TOKEN"})
# Go's RE2, which the controller uses, has no look-around, back-reference, condition, comment, atomic group, possessive
# repetition or \Z; Python's module has them all.
_NOT_RE2 = re.compile(r"\(\?(=|!|<=|<!|P=|\(|#|>)|\\[1-9Z]|[*+?}]\+")


def problems(objects: Sequence[Mapping[str, Any]], *, stop_s: float) -> list[str]:
    """Return what is wrong with the objects of a job, a sentence each; an empty list if nothing is.

    Args:
        objects: what a renderer returned.
        stop_s: seconds that ranks may take from a signal to their end, the save included.
    """
    return [problem for found in objects for problem in _problems_of(found, stop_s)]


def _problems_of(found: Mapping[str, Any], stop_s: float) -> Iterator[str]:
    kind, name = found["kind"], found["metadata"]["name"]
    if not _DNS_LABEL.fullmatch(name):
        yield f"{kind} {name}: the name is not a DNS label (lower-case letters, digits and hyphens)"
    if kind == "ConfigMap":
        return
    spec = found["spec"]
    if kind == "TrainJob":
        yield from _name_length(name, "node", 0, spec["trainer"]["numNodes"])
        yield from _image(name, spec["trainer"])
        yield from _secrets(name, spec["trainer"]["env"])
        for patch in spec["runtimePatches"]:
            (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            pod = replicated["template"]["spec"]["template"]["spec"]
            yield from _grace(name, pod, stop_s)
            yield from _volumes(name, pod)
        return
    jobset = spec if kind == "JobSet" else spec["template"]["spec"]
    for pattern in _patterns(jobset):
        yield from _pattern(name, pattern)
    for replicated in jobset["replicatedJobs"]:
        inner = replicated["template"]["spec"]
        yield from _name_length(name, replicated["name"], replicated["replicas"] - 1, inner["parallelism"])
        yield from _exit_codes(name, inner)
        yield from _pod(name, inner["template"]["spec"], stop_s)
        if kind == "JobSet":
            yield from _address(name, jobset, inner)


def _name_length(name: str, replicated: str, job: int, nodes: int) -> Iterator[str]:
    longest = f"{name}-{replicated}-{job}-{nodes - 1}"
    if len(longest) + _RANDOM_SUFFIX > _MAX_CHARACTERS:
        most = len(name) - (len(longest) + _RANDOM_SUFFIX - _MAX_CHARACTERS)
        yield f"{name}: its pods' names exceed {_MAX_CHARACTERS} characters; the name of the job may have {most}"


def _patterns(jobset: Mapping[str, Any]) -> Iterator[str]:
    for rule in jobset["failurePolicy"]["rules"]:
        yield from rule.get("onJobFailureMessagePatterns", ())


def _pattern(name: str, pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{name}: the message pattern {pattern!r} is not a regular expression ({error}); it would never match"
        return
    if _NOT_RE2.search(pattern):
        yield f"{name}: the message pattern {pattern!r} uses what RE2 does not have; it would never match"


def _exit_codes(name: str, job: Mapping[str, Any]) -> Iterator[str]:
    containers = {container["name"] for container in job["template"]["spec"]["containers"]}
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is None:
            continue
        values = codes["values"]
        if values != sorted(set(values)) or 0 in values:
            yield f"{name}: exit codes {values} must be ascending, without repetition and without 0"
        if codes["containerName"] not in containers:
            yield f"{name}: exit codes are those of {codes['containerName']!r}, which is not a container of the pod"


def _pod(name: str, pod: Mapping[str, Any], stop_s: float) -> Iterator[str]:
    if pod["restartPolicy"] != "Never":
        yield f"{name}: restartPolicy is {pod['restartPolicy']}; the JobSet restarts all pods together"
    if "volumes" in pod:  # a runtime has none: each TrainJob brings its own, and its grace period
        yield from _grace(name, pod, stop_s)
        yield from _volumes(name, pod)
    for container in pod["containers"]:
        yield from _image(name, container)
        yield from _secrets(name, container.get("env", ()))


def _grace(name: str, pod: Mapping[str, Any], stop_s: float) -> Iterator[str]:
    grace = pod["terminationGracePeriodSeconds"]
    if grace <= stop_s:
        yield (
            f"{name}: a pod is ended after {grace} s, but stopping and saving may take {stop_s:g} s; allowed: "
            "a grace period longer than launch.stop_grace_s + launch.save_budget_s"
        )


def _volumes(name: str, pod: Mapping[str, Any]) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod["volumes"]]
    for container in pod["containers"]:
        mounts = [mount["name"] for mount in container["volumeMounts"]]
        for missing in sorted(set(mounts) - set(volumes)):
            yield f"{name}: {container['name']} mounts the volume {missing!r}, which the pod does not have"
        for unused in sorted(set(volumes) - set(mounts)):
            yield f"{name}: the volume {unused!r} is mounted nowhere"
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in sorted({path for path in paths if paths.count(path) > 1}):
            yield f"{name}: two volumes are mounted at {path}"
        if container["securityContext"]["readOnlyRootFilesystem"] and "/tmp" not in paths:
            yield f"{name}: the root file system is read-only and nothing is mounted at /tmp"


def _image(name: str, container: Mapping[str, Any]) -> Iterator[str]:
    if "@sha256:" not in str(container.get("image")):
        yield f"{name}: the image {container.get('image')} has no @sha256: digest, so nodes may run different programs"


def _secrets(name: str, environment: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for entry in environment:
        if "value" in entry and SECRET_VARIABLE.search(entry["name"]) and entry["name"] not in _NOT_SECRET:
            yield f"{name}: {entry['name']} is written out; name an entry of a secret instead"


def _address(name: str, jobset: Mapping[str, Any], job: Mapping[str, Any]) -> Iterator[str]:
    expected = f"{name}-{jobset['replicatedJobs'][0]['name']}-0-0.{jobset['network']['subdomain']}"
    for container in job["template"]["spec"]["containers"]:
        for entry in container["env"]:
            if entry["name"] == "MASTER_ADDR" and entry["value"] != expected:
                yield f"{name}: MASTER_ADDR is {entry['value']}, but pod 0 is called {expected}"
