"""Settings of a run's job: its size, how it is stopped and started again, and what each scheduler is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules import launch as rules
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational, section
from megamask.config.schema.section import Section
from megamask.config.schema.watchdog import WatchdogConfig

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig

_WORD = r"[A-Za-z0-9_.,:=@/+&|*()\[\]-]+"
_WORD_IN_WORDS = "a word of letters, digits and _ . , : = @ / + & | * ( ) [ ] -"
_LABEL = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
_LABEL_IN_WORDS = "a DNS label: lower-case letters, digits and '-', at most 63, beginning with a letter"
_QUALIFIED = r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_QUALIFIED_IN_WORDS = "a Kubernetes name, as example.com/name"
_DEFAULT_SAVE_BUDGET_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Section):
    """Options of Slurm alone; values are those of sbatch's options."""

    partition: str | None = operational("--partition", default=None, pattern=_WORD, pattern_words=_WORD_IN_WORDS)
    account: str | None = operational("--account", default=None, pattern=_WORD, pattern_words=_WORD_IN_WORDS)
    qos: str | None = operational("--qos", default=None, pattern=_WORD, pattern_words=_WORD_IN_WORDS)
    constraint: str | None = operational("--constraint", default=None, pattern=_WORD, pattern_words=_WORD_IN_WORDS)
    reservation: str | None = operational("--reservation", default=None, pattern=_WORD, pattern_words=_WORD_IN_WORDS)
    gpu_type: str | None = operational(
        "type of GPU in --gpus-per-node, as h100; null where the cluster names none",
        default=None,
        pattern=r"[A-Za-z][A-Za-z0-9_.-]*",
        pattern_words="letters, digits and _ . -, beginning with a letter",
    )
    container: str = operational(
        "how launch.image is started on the nodes", default="none", choices=("none", "pyxis", "apptainer")
    )
    exclude: list[str] = operational("--exclude: nodes that the job must not get", default=[])
    mail: str | None = operational(
        "--mail-user: who hears of the job's end and failure",
        default=None,
        pattern=r"[A-Za-z0-9_.+-]+(@[A-Za-z0-9.-]+)?",
        pattern_words="a user name or mail address",
    )
    extra: list[str] = operational(
        "further options of sbatch, each one word --name=value; none that another setting decides", default=[]
    )
    kill_wait_s: float | None = operational(
        "the site's seconds between SIGTERM and SIGKILL of a cancelled or preempted job: the smaller of KillWait and, "
        "where the partition is preempted, its GraceTime (`scontrol show config`, `scontrol show partition`); null "
        "where such a job need not save",
        default=30.0,
        minimum=1.0,
        unit="seconds",
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Words that sbatch or a shell would read in another way, and options that are decided elsewhere."""
        del config
        yield from rules.exclude_problems(self.exclude)
        yield from rules.extra_problems(self.extra)


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig(Section):
    """Options of Kubernetes alone, for a JobSet and for a TrainJob."""

    namespace: str = operational(
        "namespace of the job", default="default", pattern=_LABEL, pattern_words=_LABEL_IN_WORDS
    )
    queue: str | None = operational(
        "Kueue's local queue; the job is then created suspended, and Kueue starts it",
        default=None,
        pattern=_LABEL,
        pattern_words=_LABEL_IN_WORDS,
    )
    priority_class: str | None = operational(
        "priority class of the pods, and of the workload in Kueue",
        default=None,
        pattern=_LABEL,
        pattern_words=_LABEL_IN_WORDS,
    )
    required_topology: str | None = operational(
        "label of nodes that all pods must share, for Kueue's topology-aware scheduling",
        default=None,
        pattern=_QUALIFIED,
        pattern_words=_QUALIFIED_IN_WORDS,
    )
    preferred_topology: str | None = operational(
        "label of nodes that all pods share if possible",
        default=None,
        pattern=_QUALIFIED,
        pattern_words=_QUALIFIED_IN_WORDS,
    )
    node_selector: list[str] = operational("labels that a node must have, each as name=value", default=[])
    tolerations: list[str] = operational("names of taints that are tolerated", default=[])
    gpu_resource: str = operational(
        "name of the GPU resource", default="nvidia.com/gpu", pattern=_QUALIFIED, pattern_words=_QUALIFIED_IN_WORDS
    )
    rdma_resource: str | None = operational(
        "name of the RDMA resource, one for each GPU; null for none",
        default=None,
        pattern=_QUALIFIED,
        pattern_words=_QUALIFIED_IN_WORDS,
    )
    shm_gib: int = operational("size of /dev/shm; counts as memory of the pod", default=16, minimum=1, unit="GiB")
    tmp_gib: int = operational("size of the folder for temporary files", default=10, minimum=1, unit="GiB")
    claims: dict[str, str] = operational("name of a PersistentVolumeClaim -> its folder in the pods", default={})
    run_as: int = operational("user and group id of the processes", default=1000, minimum=1, maximum=2**31 - 1)
    service_account: str | None = operational(
        "service account of the pods", default=None, pattern=_LABEL, pattern_words=_LABEL_IN_WORDS
    )
    runtime: str = operational(
        "ClusterTrainingRuntime of a TrainJob", default="megamask", pattern=_LABEL, pattern_words=_LABEL_IN_WORDS
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Names that Kubernetes refuses, and two demands on the topology."""
        del config
        yield from rules.node_selector_problems(self.node_selector)
        yield from rules.toleration_problems(self.tolerations)
        yield from rules.claim_problems(self.claims)
        if self.required_topology and self.preferred_topology:
            yield Problem(
                key="launch.kubernetes.preferred_topology",
                because=f"but launch.kubernetes.required_topology is {self.required_topology}",
                allowed="one of the two",
            )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Section):
    """The job of a run: `megamask launch slurm|jobset|trainjob` makes it; and how long its processes get to stop."""

    nodes: int = operational("nodes of the job", default=1, minimum=1, unit="nodes")
    ranks_per_node: int | None = operational(
        "ranks on each node; null for the layout's ranks divided by launch.nodes",
        default=None,
        minimum=1,
        unit="ranks",
    )
    gpus_per_node: int | None = operational(
        "GPUs that are asked for on each node; null for one a rank, 0 for training on CPUs",
        default=None,
        minimum=0,
        unit="GPUs",
    )
    cpus_per_rank: int = operational("cores of each rank", default=1, minimum=1, unit="cores")
    memory_gib: int | None = operational(
        "memory of each node; null for the scheduler's default", default=None, minimum=1, unit="GiB"
    )
    time_limit: str | None = operational(
        "longest time of one attempt, as [DAYS-]HOURS:MINUTES:SECONDS; null for the scheduler's default",
        default=None,
        pattern=r"([0-9]{1,3}-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]",
        pattern_words="[DAYS-]HOURS:MINUTES:SECONDS",
    )
    name: str | None = operational(
        "name of the job; null for run.name in lower case, with '-' for '.' and '_'",
        default=None,
        pattern=r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?",
        pattern_words="lower-case letters, digits and '-', at most 40, beginning with a letter",
    )
    command: list[str] = operational("words that start megamask on the nodes", default=["megamask"])
    stop_grace_s: float = operational(
        "from the first signal that asks for an end until a rank that does not answer is ended; a save that has begun "
        "gets launch.save_budget_s more",
        default=25.0,
        minimum=1.0,
        unit="seconds",
    )
    save_budget_s: float | None = operational(
        "the longest time that the last save of an attempt may take beyond launch.stop_grace_s; null for 60, in a "
        "Slurm job for what launch.slurm.kill_wait_s leaves",
        default=None,
        minimum=0.0,
        unit="seconds",
    )
    collective_timeout_s: float = operational(
        "how long a rank waits for the others in one collective call; a first step, a save and an evaluation may lie "
        "between two of them",
        default=1800.0,
        minimum=1.0,
        unit="seconds",
    )
    max_restarts: int = operational(
        "restarts after which a job that fails is not started again; preemptions are not counted",
        default=20,
        minimum=0,
        unit="restarts",
    )
    no_progress_attempts: int = operational(
        "a job whose last so many attempts failed at the same step is not started again (93)",
        default=3,
        minimum=2,
        unit="attempts",
    )
    exclude_suspects: bool = operational(
        "after a hardware fault, exclude the node from the job's next start (Slurm)", default=True
    )
    preflight: bool = operational(
        "check each node before its ranks start: storage, free space, clock, shared memory, GPUs; a node that is not "
        "fit ends the job with 70 and is the suspected one",
        default=True,
    )
    fabric: str | None = operational(
        "network between the nodes, for the variables that NCCL and gloo need; null sets none",
        default=None,
        choices=("infiniband", "roce", "efa", "tcp"),
    )
    interface: str | None = operational(
        "network interface over which the ranks of different nodes meet; null for the libraries' choice",
        default=None,
        pattern=r"[A-Za-z0-9_.-]{1,15}",
        pattern_words="the name of an interface, as eth0",
    )
    environment: dict[str, str] = operational("variables of every rank, name -> value", default={})
    secrets: dict[str, str] = operational(
        "variables whose value is a secret, name -> env:NAME (the submitting shell's variable of that name; Slurm) or "
        "k8s:SECRET/KEY (an entry of a Kubernetes secret)",
        default={},
    )
    image: str | None = operational(
        "container image with its @sha256: digest, or on Slurm an image file's absolute path",
        default=None,
        pattern=r"[A-Za-z0-9_.#:/-]+@sha256:[0-9a-f]{64}|/[A-Za-z0-9_.@:/-]+",
        pattern_words="a name with an @sha256: digest of 64 hexadecimal digits, or an absolute path",
    )
    mounts: list[str] = operational(
        "folders of the host that the container sees, each as SOURCE:TARGET[:ro]", default=[]
    )
    workdir: str | None = operational(
        "folder that the command starts in; null for the scheduler's default",
        default=None,
        pattern=r"/[A-Za-z0-9_.@+=,/-]*",
        pattern_words="an absolute path of letters, digits and _ . @ + = , / -",
    )
    metrics_folder: str | None = operational(
        "folder of a Prometheus textfile collector; `megamask launch node` keeps a file megamask-RUN-NODE.prom in it; "
        "runs that share a folder need different names; null writes none",
        default=None,
        is_path=True,
    )
    watchdog: WatchdogConfig = section()
    slurm: SlurmConfig = section()
    kubernetes: KubernetesConfig = section()

    @property
    def effective_save_budget_s(self) -> float:
        """Seconds of a last save beyond the grace period."""
        return _DEFAULT_SAVE_BUDGET_S if self.save_budget_s is None else self.save_budget_s

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Words and names that a shell, Slurm or Kubernetes would read in another way, and secrets written out."""
        del config
        yield from rules.command_problems(self.command)
        yield from rules.environment_problems(self.environment)
        yield from rules.secret_problems(self.secrets, self.environment)
        yield from rules.mount_problems(self.mounts)
