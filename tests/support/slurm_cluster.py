"""A real Slurm on this machine: munged, slurmctld, and one slurmd a node in a network and a host name of its own.

Needs root, the packages slurm-wlm, munge, iproute2 and util-linux; nothing in /etc is touched, and only processes that
were started here are ended. Partition `low` is preempted by `high`, whose jobs requeue those of `low`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NEEDED = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "scontrol",
    "scancel",
    "squeue",
    "ip",
    "nsenter",
    "unshare",
    "setpriv",
)
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NET = "10.213.91"
_PORT = 27816
_TAG = "mmsl"
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
CredType=cred/munge
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdSpoolDir={base}/spool.%n
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=60
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=3600
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={kill_wait}
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why no Slurm can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm with networks of its own needs root"
    missing = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    return f"{', '.join(missing)} not installed (packages slurm-wlm munge iproute2 util-linux)" if missing else None


def wait_for(what: str, is_there: Callable[[], object], seconds: float) -> None:
    """Wait until something is true.

    Raises:
        AssertionError: it did not come in time.
    """
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


@dataclass
class Cluster:
    """A Slurm that runs.

    Args:
        base: its folder.
        kill_wait: seconds between SIGTERM and SIGKILL.
    """

    base: Path
    num_nodes: int = 3
    kill_wait: int = 60
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [f"node{number + 1}" for number in range(self.num_nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user of this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGAMASK_"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH"):
            kept.pop(name, None)
        path = f"{kept.get('PATH', '')}:{_PATH}"
        return {**kept, "PATH": path, "SLURM_CONF": str(self.base / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def call(self, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of this cluster."""
        words = [str(argument) for argument in arguments]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        shown = self.call("scontrol", "-o", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def start_now(self, number: str) -> None:
        """Shorten the fixed wait of a requeued job.

        Not to nothing: slurmd refuses a start within the second in which it ended the job ("credential revoked").
        """
        wait_for("the requeued job", lambda: self.job(number)["JobState"] == "PENDING", 600)
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now+10")

    def kill_node(self, node: str) -> None:
        """Kill every process of a node, as a power cut does."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        inside = f'hostname {node}; mount --bind {self.base}/hosts /etc/hosts; exec "$@"'
        prefix = ["nsenter", f"--net=/run/netns/{_TAG}-{node}", "unshare", "--uts", "--mount", "sh", "-c", inside, "sh"]
        self._spawn(f"slurmd.{node}", [*prefix, "slurmd", "-D", "-N", node])

    def network(self, node: str, state: str) -> None:
        """Cut a node's network ("down") or mend it ("up")."""
        _ip("link", "set", f"{_TAG}v{self.nodes.index(node)}", state)

    def idle(self) -> bool:
        """Return True if every node waits for work."""
        states = self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%t").stdout.split()
        return states == ["idle"] * self.num_nodes

    def rest(self) -> None:
        """Cancel every job and bring every node back: a test begins."""
        self.call("scancel", "--user=root")
        for node in self.nodes:
            self.network(node, "up")
            if not self.pids(node):
                self.start_node(node)
        wait_for("the jobs to end", lambda: not self.call("squeue", "-h").stdout.strip(), 300 + self.kill_wait)
        wait_for("the nodes to be idle", self.idle, 300)

    def up(self) -> None:
        """Start the daemons."""
        for name in ("log", "state"):
            (self.base / name).mkdir(parents=True)
        host = socket.gethostname()
        addresses = {node: f"{_NET}.{number + 1}" for number, node in enumerate(self.nodes)}
        entries = "".join(f"{address} {node}\n" for node, address in addresses.items())
        (self.base / "hosts").write_text(f"127.0.0.1 localhost\n{_NET}.254 {host}\n{entries}")
        size = f"Port={_PORT + 1} CPUs=4 RealMemory=8000 State=UNKNOWN"
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={address} {size}" for node, address in addresses.items()
        ]
        conf = _SLURM_CONF.format(
            host=host, net=_NET, port=_PORT, base=self.base, kill_wait=self.kill_wait, nodes="\n".join(lines)
        )
        (self.base / "slurm.conf").write_text(conf)
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # none is looked for
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._networks(addresses)
        socket_path = self.base / "munge.socket"
        places = [f"--socket={socket_path}", f"--key-file={key}"]
        places += [f"--{name}-file={self.base}/munged.{name}" for name in ("pid", "log", "seed")]
        self._spawn("munged", ["munged", "--foreground", "--force", *places])
        wait_for("munged", socket_path.exists, 120)
        self._spawn("slurmctld", ["slurmctld", "-D"])
        wait_for("slurmctld", lambda: "is UP" in self.call("scontrol", "ping").stdout, 120)
        for node in self.nodes:
            self.start_node(node)
        wait_for("the nodes to be idle", self.idle, 300)

    def down(self) -> None:
        """End the jobs, the daemons and the networks."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.call("scancel", "--user=root", "--signal=KILL", timeout=20)
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()
        self._remove_networks()

    def _remove_networks(self) -> None:
        for number, node in enumerate(self.nodes):
            self.kill_node(node)
            _ip("link", "del", f"{_TAG}v{number}", check=False)
            _ip("netns", "del", f"{_TAG}-{node}", check=False)
        _ip("link", "del", f"{_TAG}br", check=False)

    def _networks(self, addresses: dict[str, str]) -> None:
        self._remove_networks()  # of a cluster that was killed with its tests
        _ip("link", "add", f"{_TAG}br", "type", "bridge")
        _ip("addr", "add", f"{_NET}.254/24", "dev", f"{_TAG}br")
        _ip("link", "set", f"{_TAG}br", "up")
        for number, (node, address) in enumerate(addresses.items()):
            space = f"{_TAG}-{node}"
            _ip("netns", "add", space)
            _ip("link", "add", f"{_TAG}v{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", f"{_TAG}v{number}", "master", f"{_TAG}br", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def pids(self, node: str) -> list[int]:
        """Return the processes of a node."""
        return [int(pid) for pid in _ip("netns", "pids", f"{_TAG}-{node}", check=False).split()]

    def _spawn(self, name: str, words: Sequence[str]) -> None:
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],  # a killed test leaves no daemon behind
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment,
            )


@contextlib.contextmanager
def slurm_cluster(base: Path, *, num_nodes: int = 3, kill_wait: int = 60) -> Iterator[Cluster]:
    """Start a Slurm, and end it afterwards."""
    cluster = Cluster(base, num_nodes=num_nodes, kill_wait=kill_wait)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


def _ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check).stdout
