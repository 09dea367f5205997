"""A rendered JobSet run as local processes: an emulation of its controllers and of the kubelet, not the real ones.

Each pod has a network, a host name and mounts of its own on an overlay of this machine's root; the image is not pulled.
Followed: user and group id, a read-only root, emptyDir, ConfigMap and claims, the names of the headless service,
$(VAR), the downward API, SIGTERM and then SIGKILL to the first process; podFailurePolicy with FailJob, the JobSet's
rules, maxRestarts, and a restart of all pods. Not followed: scheduling, queues, probes, resources, several containers.
Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NEEDED = ("ip", "nsenter", "unshare", "setpriv", "chroot")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_BRIDGE, _NET = "mmpods", "10.213.93"
_LABEL = "jobset.sigs.k8s.io"
Object = dict[str, Any]


def why_not() -> str | None:
    """Return why no pods can be emulated here, or None."""
    if os.geteuid() != 0:
        return "pods with networks and roots of their own need root"
    missing = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} not installed (packages iproute2 util-linux)" if missing else None


@dataclass
class Pod:
    """One pod of one attempt."""

    jobset: Object
    index: int
    attempt: int
    address: str
    log: Path
    is_evicted: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def job(self) -> Object:
        (replicated,) = self.jobset["spec"]["replicatedJobs"]
        job: Object = replicated["template"]["spec"]
        return job

    @property
    def spec(self) -> Object:
        spec: Object = self.job["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        found: Object = container
        return found

    @property
    def name(self) -> str:
        return f"{self.jobset['metadata']['name']}-node-0-{self.index}"

    @property
    def space(self) -> str:
        return f"{_BRIDGE}-{self.index}"

    @property
    def code(self) -> int | None:
        """Exit code of the first process, 128 + n of a signal; None while it runs."""
        assert self.process is not None
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Variables of the container, in the order in which Kubernetes expands them."""
        labels = {f"{_LABEL}/jobset-uid": "uid-1", f"{_LABEL}/restart-attempt": str(self.attempt)}
        downward = {"spec.nodeName": f"host-{self.index}-{self.attempt}", "metadata.uid": f"pod-{self.index}"}
        downward |= {f"metadata.labels['{name}']": value for name, value in labels.items()}
        found = {"PATH": _PATH, "HOSTNAME": self.name, "JOB_COMPLETION_INDEX": str(self.index), **extra}
        for entry in self.container["env"]:
            if "value" in entry:
                found[entry["name"]] = _expanded(entry["value"], found)
            else:
                found[entry["name"]] = downward[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        return found

    def failure(self) -> str | None:
        """Message of the first podFailurePolicy rule that this pod matches, in the Job controller's words."""
        where = f"default/{self.name}-abcde"
        for number, rule in enumerate(self.job["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            if codes is not None and self.code in codes["values"]:
                event = f"Container {codes['containerName']} for pod {where} failed with exit code {self.code}"
            elif codes is None and self.is_evicted:
                event = f"Pod {where} has condition DisruptionTarget"
            else:
                continue
            return f"{event} matching {rule['action']} rule at index {number}"
        return None


@dataclass
class Emulation:
    """One run of a JobSet.

    Args:
        objects: the ConfigMap and the JobSet, as rendered.
        claims: name of a claim -> folder of this machine.
        shown: folders that a pod sees at their own path although a parent is closed to its user.
        names_after_s: seconds after the pods' start at which their names are published.
    """

    objects: Sequence[Object]
    folder: Path
    claims: Mapping[str, Path]
    shown: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    names_after_s: float = 0.0
    actions: list[str] = field(default_factory=list)
    codes: list[list[int | None]] = field(default_factory=list)

    def run(self, evict: Callable[[], int | None] = lambda: None, *, seconds: float = 600) -> str:
        """Run the JobSet to its end.

        Args:
            evict: asked again and again; the number of a pod that is to be evicted now, once.

        Returns: Completed or Failed.
        """
        config_map, jobset = self.objects
        (self.folder / "config").mkdir(parents=True)
        for name, text in config_map["data"].items():
            (self.folder / "config" / name).write_text(text)
        policy, counted = jobset["spec"]["failurePolicy"], 0
        with _bridge():
            for attempt in range(50):
                pods = self._pods(jobset, attempt)
                try:
                    failed = self._watch(pods, evict, time.monotonic() + seconds)
                finally:
                    _stop(pods)
                    self.codes.append([pod.code for pod in pods])
                    for pod in pods:
                        _remove(pod)
                if failed is None:
                    return "Completed"
                action = _action(policy, failed.failure())
                self.actions.append(action)
                if action == "FailJobSet" or (action == "RestartJobSet" and counted >= policy["maxRestarts"]):
                    return "Failed"
                counted += action == "RestartJobSet"
        raise AssertionError("50 attempts")

    @property
    def log(self) -> str:
        """Output of all pods."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def _pods(self, jobset: Object, attempt: int) -> list[Pod]:
        pods = [
            Pod(jobset, index, attempt, f"{_NET}.{index + 1}", self.folder / f"pod-{index}.{attempt}.log")
            for index in range(jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"])
        ]
        hosts = self.folder / f"hosts.{attempt}"
        hosts.write_text("127.0.0.1 localhost\n")
        for pod in pods:
            self._start(pod, hosts)
        return pods

    def _publish(self, pods: Sequence[Pod]) -> None:
        subdomain = pods[0].jobset["spec"]["network"]["subdomain"]
        lines = "".join(f"{pod.address} {pod.name}.{subdomain} {pod.name}\n" for pod in pods)
        with (self.folder / f"hosts.{pods[0].attempt}").open("a") as file:
            file.write(lines)

    def _start(self, pod: Pod, hosts: Path) -> None:
        link = f"{_BRIDGE}{pod.index}"
        _ip("netns", "add", pod.space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pod.space)
        _ip("link", "set", link, "master", _BRIDGE, "up")
        _ip("-n", pod.space, "link", "set", "lo", "up")
        _ip("-n", pod.space, "addr", "add", f"{pod.address}/24", "dev", "eth0")
        _ip("-n", pod.space, "link", "set", "eth0", "up")
        user = pod.spec["securityContext"]
        variables = pod.environment(self.environment)
        words = [_expanded(word, variables) for word in pod.container["command"]]
        start = ["env", "-i", *(f"{name}={value}" for name, value in variables.items())]
        start += ["setpriv", "--no-new-privs", "--pdeathsig", "KILL"]
        start += ["chroot", f"--userspec={user['runAsUser']}:{user['runAsGroup']}", "/mnt/r", *words]
        script = "\n".join([*self._mounts(pod, hosts), f"exec {shlex.join(start)}"])
        space = ["nsenter", f"--net=/run/netns/{pod.space}", "unshare", "--uts", "--mount"]
        with pod.log.open("wb") as log:
            pod.process = subprocess.Popen(
                [*space, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _mounts(self, pod: Pod, hosts: Path) -> Iterator[str]:
        """Shell lines that make the container's root under /mnt/r."""
        yield from ("set -e", f"hostname {pod.name}", "mount --make-rprivate /", "mount -t tmpfs pod /mnt")
        yield from ("mkdir /mnt/u /mnt/w /mnt/r", "chmod 755 /mnt/u /mnt/r")
        yield "mount -t overlay pod -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r"
        yield from (f"mount --rbind /{name} /mnt/r/{name}" for name in ("proc", "sys", "dev"))
        yield "touch /mnt/r/etc/hosts"
        yield f"mount --bind {shlex.quote(str(hosts))} /mnt/r/etc/hosts"
        yield "mount -t tmpfs -o mode=755 pod /mnt/r/root"
        for folder in self.shown:
            target = shlex.quote(f"/mnt/r{folder}")
            yield f"mkdir -p {target}; mount --bind {shlex.quote(str(folder))} {target}"
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            volume, target = volumes[mount["name"]], shlex.quote(f"/mnt/r{mount['mountPath']}")
            yield f"mkdir -p {target}"
            if "emptyDir" in volume:
                yield f"mount -t tmpfs -o mode=1777 pod {target}"
            else:
                claim = volume.get("persistentVolumeClaim")
                source = self.folder / "config" if claim is None else self.claims[claim["claimName"]]
                yield f"mount --bind {shlex.quote(str(source))} {target}"
        if pod.container["securityContext"]["readOnlyRootFilesystem"]:
            yield "mount -o remount,ro /mnt/r"

    def _watch(self, pods: Sequence[Pod], evict: Callable[[], int | None], deadline: float) -> Pod | None:
        """Wait until all pods are done, or one has failed; return that one."""
        publish_at = time.monotonic() + self.names_after_s
        is_published = False
        while True:
            assert time.monotonic() < deadline, f"the pods did not end\n{self.log}"
            if not is_published and time.monotonic() >= publish_at:
                self._publish(pods)
                is_published = True
            if (number := evict()) is not None:
                pods[number].is_evicted = True
                _stop([pods[number]])
            failed = [pod for pod in pods if pod.code is not None and (pod.code != 0 or pod.is_evicted)]
            if failed:
                return failed[0]
            if all(pod.code == 0 for pod in pods):
                return None
            time.sleep(0.1)


def _action(policy: Object, message: str | None) -> str:
    """Return the action of the JobSet controller: the first rule with a pattern that is found in the Job's message."""
    reason = "BackoffLimitExceeded" if message is None else "PodFailurePolicy"
    for rule in policy["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message or "") for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def _stop(pods: Sequence[Pod]) -> None:
    """End pods as the kubelet does: SIGTERM to the first process, the grace period, SIGKILL to all."""
    live = [pod for pod in pods if pod.process is not None and pod.code is None]
    for pod in live:
        assert pod.process is not None
        pod.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + max((pod.spec["terminationGracePeriodSeconds"] for pod in live), default=0)
    while time.monotonic() < deadline and any(pod.code is None for pod in live):
        time.sleep(0.1)
    for pod in live:
        if pod.code is None:
            assert pod.process is not None
            pod.process.kill()
            pod.process.wait()


def _remove(pod: Pod) -> None:
    for pid in _ip("netns", "pids", pod.space, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("link", "del", f"{_BRIDGE}{pod.index}", check=False)
    _ip("netns", "del", pod.space, check=False)


@contextlib.contextmanager
def _bridge() -> Iterator[None]:
    _ip("link", "del", _BRIDGE, check=False)  # of tests that were killed
    _ip("link", "add", _BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{_NET}.254/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        yield
    finally:
        _ip("link", "del", _BRIDGE, check=False)


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), text)


def _ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check).stdout
