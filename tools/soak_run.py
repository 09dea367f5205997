"""One run under faults: start an attempt, let a fault meet it, wait for its end, and compare what is left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from soak_faults import Fault, arm
from soak_process import ForkedProcess, command, enter_namespace, replace_launch

from megamask.checkpoint.contents import read_state
from megamask.checkpoint.integrity import verify_folder
from megamask.checkpoint.reader import candidates
from megamask.engine.state.restore import read_num_updates
from megamask.engine.state.safetensors import StateReader
from megamask.engine.state.slices import StoredSlice

# What may differ between two runs of one config (docs/formats.md, "Journal").
VOLATILE = {"time", "prev", "seq", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "kind"}
COMPARED = ("step", "evaluation", "sample_preview")
HANGS = -999
_POLL_S = 0.01
_PATIENCE_S = 240.0
_ADDRESSES = ("10.97.0.1", "10.97.0.2")


@dataclass(kw_only=True)
class Links:
    """Two network namespaces with a link between them, so that ranks on "two nodes" can be cut off from each other."""

    names: tuple[str, str] = field(default_factory=lambda: (f"mmsoak-a{os.getpid()}", f"mmsoak-b{os.getpid()}"))

    @contextlib.contextmanager
    def made(self) -> Iterator[bool]:
        """Make them; False where this machine or user may not."""
        first, second = self.names
        steps = [["netns", "add", first], ["netns", "add", second]]
        steps.append(["link", "add", "mmsoak0", "netns", first, "type", "veth", "peer", "mmsoak0", "netns", second])
        for name, address in zip(self.names, _ADDRESSES, strict=True):
            steps += [["-n", name, "addr", "add", f"{address}/24", "dev", "mmsoak0"]]
            steps += [["-n", name, "link", "set", device, "up"] for device in ("mmsoak0", "lo")]
        try:
            yield all(_ip(*step) for step in steps)
        finally:
            for name in self.names:
                _ip("netns", "del", name)

    def set(self, *, is_up: bool) -> None:
        """Cut or restore the link."""
        _ip("-n", self.names[0], "link", "set", "mmsoak0", "up" if is_up else "down")


def _ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@dataclass(kw_only=True)
class Attempt:
    """One attempt: its processes, and what is to be done to them."""

    arguments: Sequence[str]
    run_dir: Path
    log: Path
    num_ranks: int
    fault: Fault | None = None
    census: Path | None = None
    links: Links | None = None
    disk: Path | None = None
    started_at: float = field(default_factory=time.time)
    processes: list[ForkedProcess] = field(default_factory=list)

    def run(self) -> tuple[int, ...]:
        """Start it, let the fault happen, and return the exit codes of what was started."""
        before = last_line(self.run_dir)
        if self.fault is not None and self.fault.kind == "link cut" and self.links is not None:
            self._start_apart(self.links)
        else:
            self.processes = [ForkedProcess(self._train)]
        try:
            if self.fault is not None and (self.fault.point is None or self.fault.kind.startswith("clock")):
                self._wait_for_the_moment(before)
                self._act(self.fault)
            return tuple(_code(process) for process in self.processes)
        finally:
            self._clean()

    def _environment(self) -> dict[str, str]:
        plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        return {**plain, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def _train(self) -> int:
        is_launcher = self.num_ranks > 1
        in_rank = lambda rank: arm(self.fault, rank, self.census)  # noqa: E731
        prepare = [lambda: replace_launch(in_rank)] if is_launcher else []
        own = -1 if is_launcher else 0
        return command(self.arguments, self._environment(), self.log, *prepare, lambda: in_rank(own))

    def _start_apart(self, links: Links) -> None:
        """Two ranks in two namespaces, as another launcher would start them."""
        port = 20000 + int(time.time() * 10) % 20000
        for rank, name in enumerate(links.names):
            place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            place |= {"MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "mmsoak0"}
            environment = {**self._environment(), **place}

            def train(name: str = name, environment: Mapping[str, str] = environment) -> int:
                return command(self.arguments, environment, self.log, lambda: enter_namespace(name))

            self.processes.append(ForkedProcess(train))

    def _wait_for_the_moment(self, before: tuple[str, int]) -> None:
        assert self.fault is not None
        deadline = time.monotonic() + _PATIENCE_S
        if not self.fault.is_early:
            while self._is_running() and time.monotonic() < deadline:
                now = last_line(self.run_dir)
                if now != before and now[1] > 0:
                    break
                time.sleep(_POLL_S)
        time.sleep(self.fault.wait_s)

    def _is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def _act(self, fault: Fault) -> None:
        """Faults that reach the processes from outside."""
        process = self.processes[0]
        match fault.kind:
            case "SIGKILL of everything" | "clock jump, then SIGKILL":
                process.kill()
            case "SIGKILL of one rank":
                self._signal_rank(fault.rank, signal.SIGKILL)
            case "SIGTERM":
                process.send_signal(signal.SIGTERM)
            case "SIGTERM of one rank":
                self._signal_rank(fault.rank, signal.SIGTERM)
            case "SIGSTOP, SIGCONT, then SIGTERM":
                self._signal_rank(fault.rank, signal.SIGSTOP)
                time.sleep(fault.wait_s + 0.2)
                self._signal_rank(fault.rank, signal.SIGCONT)
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
            case "SIGSTOP of one rank, then SIGTERM":
                self._signal_rank(fault.rank, signal.SIGSTOP)
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
            case "full disk":
                self._fill_the_disk()
            case "link cut":
                assert self.links is not None
                self.links.set(is_up=False)

    def _signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Signal a rank: the launcher's child, or the only process."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError, ProcessLookupError):
            pid = self.processes[0].pid
            if self.num_ranks > 1:
                children = sorted(psutil.Process(pid).children(), key=lambda child: child.pid)
                pid = children[rank].pid
            os.kill(pid, number)

    def _fill_the_disk(self) -> None:
        assert self.disk is not None
        with (self.disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def _clean(self) -> None:
        """Nothing of the attempt stays: processes, ballast, a cut link."""
        family = [child for process in self.processes for child in _family(process.pid)]
        for process in self.processes:
            process.kill()
            process.wait(_PATIENCE_S)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait(_PATIENCE_S)
        if self.disk is not None:
            (self.disk / "ballast").unlink(missing_ok=True)
        if self.links is not None:
            self.links.set(is_up=True)


def _code(process: ForkedProcess) -> int:
    """The exit code; HANGS for a process that does not end."""
    try:
        return process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return HANGS


def _family(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a journal, each with the attempt of its file."""
    found = []
    for path in sorted((run_dir / "journal").glob("attempt-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            found.append(json.loads(line) | {"attempt_of_file": int(path.name[8:12])})
    return found


def last_line(run_dir: Path) -> tuple[str, int]:
    """Return the newest file of the journal and the bytes up to its last step line."""
    paths = sorted((run_dir / "journal").glob("attempt-*.jsonl"))
    if not paths:
        return "", 0
    return paths[-1].name, paths[-1].read_bytes().rfind(b'"kind":"step"') + 1


def compared_lines(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the lines of steps, evaluations and previews that hold, without what may differ between two runs."""
    ignored = VOLATILE | {"attempt_of_file"}
    lines = [record for record in records(run_dir) if record["kind"] in COMPARED]
    return {
        (line["kind"], line["step"]): {key: value for key, value in line.items() if key not in ignored}
        for line in lines
    }


def state_digest(folder: Path) -> str:
    """Return sha256 over everything that a checkpoint restores: tensors, counts and position."""
    reader, digest = StateReader(folder), hashlib.sha256()
    for name, stored in sorted(reader.index.items()):
        data = torch.empty(stored.shape, dtype=torch.float32)
        reader.read([StoredSlice(name=name, shape=stored.shape, offsets=(0,) * len(stored.shape), data=data)])
        digest.update(name.encode() + data.numpy().tobytes())
    digest.update(json.dumps([read_num_updates(folder), read_state(folder).scalars()]).encode())
    return digest.hexdigest()


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name[5:13]) for path in candidates(run_dir)), default=0) if run_dir.is_dir() else 0


def compare(
    run_dir: Path, lines: Mapping[tuple[str, int], Any], states: Mapping[int, str], *, is_complete: bool
) -> list[str]:
    """Compare what is left of a run with the uninterrupted one; return what differs, is missing or cannot be loaded."""
    problems = []
    found = compared_lines(run_dir)
    if is_complete:
        missing = [f"{kind} of step {step}" for kind, step in lines if (kind, step) not in found]
        problems += [f"wrong bytes: no line of {', '.join(missing)}"] if missing else []
    for key, line in found.items():
        if line != lines.get(key):
            names = [name for name in line if line[name] != (lines.get(key) or {}).get(name)]
            problems.append(f"wrong bytes: {key[0]} line of step {key[1]} differs in {', '.join(names)}")
    folders = candidates(run_dir) if run_dir.is_dir() else []
    for folder in folders[:1]:
        try:
            step = verify_folder(folder).step
            if state_digest(folder) != states[step]:
                problems.append(f"wrong bytes: the state of step {step} differs ({folder.name})")
        except Exception as error:  # noqa: BLE001  any refusal is a finding
            problems.append(f"unloadable: {folder.name}: {error!r}")
    return problems
