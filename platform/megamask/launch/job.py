"""A job for a scheduler, free of any scheduler: what runs, on how many nodes, and how it is stopped.

Renderers turn a `Job` into text (slurm.py) or into Kubernetes objects (jobset.py, trainjob.py). Everything here is
pure: no environment, no files. Nothing reaches a shell unquoted: the command is a list of words, and every other string
was checked by the config against a pattern without shell characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STOP_CODES = (2, 64, 65, 66, 93, 130)
"""Exit codes after which a job is not started again, beside 0; docs/architecture.md, exit codes."""

EXCLUDE_CODES = (16, 17, 70)
"""Exit codes that ask for another node."""

DRAIN_CODES = (17, 70)
"""Exit codes after which an operator should look at the node."""

COUNTED_CODES = (16, 17, 70, 71, 74)
"""Exit codes, beside those of bugs and signals, after which a job is started again and the restart is counted."""

FREE_CODES = (75,)
"""Exit codes after which a job is started again without counting."""

RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder of the host or claim that the container sees."""

    source: str
    target: str
    is_read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class SecretKey:
    """An entry of a Kubernetes secret; its value is never read here."""

    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of Slurm alone.

    Args:
        gpu_type: type of GPU, as h100; None where the cluster names none.
        container: how the image is started: pyxis, apptainer or none.
        extra: further options, each one word `--name=value`.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpu_type: str | None = None
    container: str = "none"
    exclude: tuple[str, ...] = ()
    mail: str | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """Options of Kubernetes alone.

    Args:
        queue: Kueue's local queue; the job is then created suspended and Kueue starts it.
        required_topology, preferred_topology: node label that all pods share, for Kueue's topology-aware scheduling.
        tolerations: keys of taints that are tolerated.
        gpu_resource: name of the GPU resource.
        rdma_resource: name of the RDMA resource, one for each GPU; None for none.
        claims: PersistentVolumeClaim -> path in the container.
        runtime: name of the ClusterTrainingRuntime of a TrainJob.
    """

    namespace: str = "default"
    queue: str | None = None
    priority_class: str | None = None
    required_topology: str | None = None
    preferred_topology: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    gpu_resource: str = "nvidia.com/gpu"
    rdma_resource: str | None = None
    shm_gib: int = 16
    tmp_gib: int = 10
    claims: Mapping[str, str] = field(default_factory=dict)
    run_as: int = 1000
    service_account: str | None = None
    runtime: str = "megamask"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job.

    Args:
        name: letters, digits and hyphens, at most 40 characters: pods of a JobSet carry it in their names.
        program: words before the arguments, as ("megamask",).
        config: path of the config, as the nodes see it.
        config_text: the composed config, for jobs whose nodes do not share the submitter's files.
        overrides: key=value words after the config.
        run_dir: the run directory, where the verdict is read beside.
        gpus_per_node: GPUs that are asked for; 0 for training on CPUs.
        cpus_per_rank, memory_gib: per rank and per node.
        time_limit_s: of one attempt; None for the partition's.
        notice_s: seconds before a time limit at which the ranks are asked to save; also the grace period of a pod.
        environment: variables of every rank, as they are.
        secrets: variable -> None where the submitter's environment has it (Slurm), or an entry of a secret.
        image: container image with its digest, or None.
        workdir: folder that the command starts in.
    """

    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus_per_rank: int = 1
    memory_gib: int | None = None
    time_limit_s: int | None = None
    program: tuple[str, ...] = ("megamask",)
    config: str
    config_text: str = ""
    overrides: tuple[str, ...] = ()
    run_dir: str
    notice_s: int = 120
    max_restarts: int = 20
    exclude_suspects: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, SecretKey | None] = field(default_factory=dict)
    image: str | None = None
    mounts: tuple[Mount, ...] = ()
    workdir: str | None = None
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    kubernetes: KubernetesOptions = field(default_factory=KubernetesOptions)

    @property
    def command(self) -> tuple[str, ...]:
        """The words that start one node's ranks."""
        return (*self.program, "launch", "node", self.config, *self.overrides)

    @property
    def cpus_per_node(self) -> int:
        """Cores of a node."""
        return self.ranks_per_node * self.cpus_per_rank
