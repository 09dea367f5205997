"""Rules of the words of a job: nothing that a shell, Slurm or Kubernetes would read in another way; no secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megamask.config.rules.problem import Problem

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OWN_VARIABLES = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_NAME", "POD_UID"}
)
_OWN_PREFIXES = ("MEGAMASK_", "SLURM_", "JOBSET_", "JOB_COMPLETION_")
# TOKENIZERS_PARALLELISM is none.
SECRET_VARIABLE = re.compile(
    r"PASSW(OR)?D|TOKEN(?!IZER)|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_KUBERNETES_SECRET = re.compile(r"k8s:([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)/([A-Za-z0-9._-]{1,253})")
_MOUNT = re.compile(r"(/[A-Za-z0-9_.@+=/-]*):(/[A-Za-z0-9_.@+=/-]*)(:ro)?")
_EXTRA = re.compile(r"--([a-z][a-z0-9-]*)(=[A-Za-z0-9_.,:=@/+%*\[\]-]+)?")
_NODE = re.compile(r"[A-Za-z0-9_.,\[\]-]+")
_LABEL = re.compile(r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_CLAIM_FOLDER = re.compile(r"/[A-Za-z0-9_.@+=/-]+")
_POD_FOLDERS = ("/tmp", "/dev/shm", "/etc/megamask")
# sbatch's options that other settings decide, or without which the exit-code contract does not hold.
_DECIDED = {
    "job-name": "launch.name",
    "nodes": "launch.nodes",
    "ntasks": "launch.ranks_per_node",
    "ntasks-per-node": "launch.ranks_per_node",
    "cpus-per-task": "launch.cpus_per_rank",
    "mem": "launch.memory_gib",
    "time": "launch.time_limit",
    "partition": "launch.slurm.partition",
    "account": "launch.slurm.account",
    "qos": "launch.slurm.qos",
    "constraint": "launch.slurm.constraint",
    "reservation": "launch.slurm.reservation",
    "gpus-per-node": "launch.gpus_per_node",
    "exclude": "launch.slurm.exclude",
    "mail-user": "launch.slurm.mail",
    "chdir": "launch.workdir",
    "signal": "launch.save_budget_s",
    "requeue": "launch.max_restarts",
    "no-requeue": "launch.max_restarts",
    "open-mode": "the renderer",
    "wrap": "the renderer",
    "array": "the renderer",
    "export": "launch.environment",
}


def command_problems(words: Sequence[str]) -> Iterator[Problem]:
    """An empty command, or an empty word in it."""
    if not words or not all(words):
        yield Problem(key="launch.command", because="which starts nothing", allowed="one or more words, as [megamask]")


def environment_problems(environment: Mapping[str, str]) -> Iterator[Problem]:
    """Names that are not variables, that the launcher sets itself, or that belong to a secret."""
    key = "launch.environment"
    for name in environment:
        if not VARIABLE.fullmatch(name):
            yield Problem(key=key, because=f"and {name} is not a name of a variable", allowed="letters, digits and '_'")
        elif name in OWN_VARIABLES or name.startswith(_OWN_PREFIXES):
            yield Problem(key=key, because=f"and {name} is set by the launcher itself", allowed="other variables")
        elif SECRET_VARIABLE.search(name):
            yield Problem(
                key=key,
                because=f"and {name} is a secret by its name, which would be written out in the job",
                allowed="other variables; name it in launch.secrets instead",
            )


def secret_problems(secrets: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Problem]:
    """References that name neither a variable nor an entry of a Kubernetes secret."""
    key = "launch.secrets"
    for name, reference in secrets.items():
        if not VARIABLE.fullmatch(name) or name in OWN_VARIABLES or name.startswith(_OWN_PREFIXES):
            yield Problem(key=key, because=f"and {name} cannot be the variable of a secret", allowed="other variables")
        elif name in environment:
            yield Problem(key=key, because=f"and {name} is in launch.environment as well", allowed="one of the two")
        elif reference != f"env:{name}" and kubernetes_secret(reference) is None:
            yield Problem(
                key=key,
                because=f"and {name} is not a reference to a secret",
                allowed=f"env:{name}, the variable of the shell that submits, or k8s:SECRET/KEY",
            )


def kubernetes_secret(reference: str) -> tuple[str, str] | None:
    """Return name and key of k8s:SECRET/KEY, or None for another reference."""
    found = _KUBERNETES_SECRET.fullmatch(reference)
    return None if found is None else (found[1], found[3])


def mount_problems(mounts: Sequence[str]) -> Iterator[Problem]:
    """Mounts that are not SOURCE:TARGET[:ro], and two on one target."""
    yield from _unlike("launch.mounts", mounts, _MOUNT, "SOURCE:TARGET or SOURCE:TARGET:ro, absolute paths")
    targets = [mount_parts(mount)[1] for mount in mounts if _MOUNT.fullmatch(mount)]
    for target in sorted({target for target in targets if targets.count(target) > 1}):
        yield Problem(key="launch.mounts", because=f"and two of them are at {target}", allowed="one at each target")


def mount_parts(mount: str) -> tuple[str, str, bool]:
    """Return source, target, and whether it is read-only."""
    found = _MOUNT.fullmatch(mount)
    assert found is not None, "mount_problems was not asked"
    return found[1], found[2], found[3] is not None


def exclude_problems(nodes: Sequence[str]) -> Iterator[Problem]:
    """Names that are not nodes of Slurm."""
    yield from _unlike("launch.slurm.exclude", nodes, _NODE, "names of nodes, as node7 or node[1-3]")


def extra_problems(options: Sequence[str]) -> Iterator[Problem]:
    """Options that are not one word, or that another setting decides."""
    key = "launch.slurm.extra"
    yield from _unlike(key, options, _EXTRA, "--name or --name=value of letters, digits and _ . , : = @ / + % * [ ] -")
    for option in options:
        found = _EXTRA.fullmatch(option)
        if found is not None and found[1] in _DECIDED:
            yield Problem(
                key=key, because=f"and --{found[1]} is decided by {_DECIDED[found[1]]}", allowed="other options"
            )


def node_selector_problems(labels: Sequence[str]) -> Iterator[Problem]:
    """Labels that are not name=value."""
    for label in labels:
        name, sign, value = label.partition("=")
        if not (sign and _LABEL.fullmatch(name) and _LABEL_VALUE.fullmatch(value)):
            yield Problem(
                key="launch.kubernetes.node_selector",
                because=f"and {label!r} is not a label",
                allowed="name=value, as example.com/zone=a",
            )


def toleration_problems(taints: Sequence[str]) -> Iterator[Problem]:
    """Names that are not taints."""
    yield from _unlike("launch.kubernetes.tolerations", taints, _LABEL, "names of taints, as nvidia.com/gpu")


def claim_problems(claims: Mapping[str, str]) -> Iterator[Problem]:
    """Claims whose name or folder Kubernetes refuses, or that would lie over a folder of the pod."""
    key = "launch.kubernetes.claims"
    for name, folder in claims.items():
        if not _CLAIM.fullmatch(name) or name in ("shm", "tmp", "config"):
            yield Problem(key=key, because=f"and {name} cannot be a claim here", allowed="other DNS labels")
        elif not _CLAIM_FOLDER.fullmatch(folder) or any(
            (folder.rstrip("/") + "/").startswith(f"{own}/") for own in _POD_FOLDERS
        ):
            yield Problem(
                key=key,
                because=f"and {folder!r} cannot be its folder",
                allowed=f"an absolute path, not below {', '.join(_POD_FOLDERS)}",
            )
    folders = [folder.rstrip("/") for folder in claims.values()]
    if len(set(folders)) < len(folders):
        yield Problem(key=key, because="and two of them have the same folder", allowed="one claim in each folder")


def is_below(path: str, folders: Iterable[str]) -> bool:
    """True if an absolute path lies in one of the folders."""
    return any((path.rstrip("/") + "/").startswith(folder.rstrip("/") + "/") for folder in folders)


def _unlike(key: str, words: Sequence[str], pattern: re.Pattern[str], allowed: str) -> Iterator[Problem]:
    for word in words:
        if not pattern.fullmatch(word):
            yield Problem(key=key, because=f"and {word!r} is not allowed in it", allowed=allowed)
