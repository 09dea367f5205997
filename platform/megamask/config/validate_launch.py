"""Rules by which the settings of a run make a job for one scheduler."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

from megamask.config.rules.launch import is_below, kubernetes_secret, mount_parts
from megamask.config.rules.problem import Problem, divisors, listed
from megamask.config.schema.launch import LaunchConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import refuse_first

Target = Literal["slurm", "jobset", "trainjob"]
# After the ranks are ended: nodes hand in their codes and read the verdict.
CLOSING_S = 5.0
# A time limit and a pod's end are chosen here; they leave room for a slow shared file system as well.
NOTICE_MARGIN_S = 30.0
_JOB_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_RUNTIME_RESTARTS = 20


def validate_launch(config: TrainConfig, origins: Mapping[str, str] | None, target: Target) -> None:
    """Refuse a config that makes no job for this scheduler.

    Raises:
        UsageError: the first problem: key and value, reason, allowed values, where to change it.
    """
    refuse_first(launch_problems(config, target), config, origins)


def launch_problems(config: TrainConfig, target: Target) -> Iterator[Problem]:
    """Every reason why a config makes no job for this scheduler, the first to mention first."""
    yield from _size_problems(config)
    if not _JOB_NAME.fullmatch(job_name(config)):
        yield Problem(
            key="launch.name",
            because=f"and run.name {config.run.name!r} makes no name of a job ({job_name(config)!r})",
            allowed="a name of its own: lower-case letters, digits and '-', at most 40, beginning with a letter",
        )
    yield from _slurm_problems(config) if target == "slurm" else _kubernetes_problems(config, target)


def job_name(config: TrainConfig) -> str:
    """Return the name of a run's job."""
    return config.launch.name or re.sub(r"[._]", "-", config.run.name.lower())


def notice_s(launch: LaunchConfig, save_budget_s: float) -> int:
    """Return how long before its end a job is asked to save, where that time is chosen here: whole seconds."""
    return math.ceil(launch.stop_grace_s + save_budget_s + NOTICE_MARGIN_S)


def slurm_save_budget_s(launch: LaunchConfig) -> float:
    """Return the save budget of a Slurm job: the one given, or what the site's KillWait leaves."""
    wait = launch.slurm.kill_wait_s
    if launch.save_budget_s is not None or wait is None:
        return launch.effective_save_budget_s
    return max(0.0, wait - CLOSING_S - launch.stop_grace_s)


def _size_problems(config: TrainConfig) -> Iterator[Problem]:
    launch, ranks = config.launch, config.layout.num_processes
    if ranks % launch.nodes:
        yield Problem(
            key="launch.nodes",
            because=f"and the layout has {ranks} ranks, which they cannot share equally",
            allowed=f"{listed(divisors(ranks))}; or another layout",
        )
    elif launch.ranks_per_node is not None and launch.ranks_per_node * launch.nodes != ranks:
        yield Problem(
            key="launch.ranks_per_node",
            because=f"but the layout has {ranks} ranks on launch.nodes={launch.nodes}",
            allowed=f"null or {ranks // launch.nodes}; or another layout",
        )


def _slurm_problems(config: TrainConfig) -> Iterator[Problem]:
    launch = config.launch
    wait, budget = launch.slurm.kill_wait_s, slurm_save_budget_s(launch)
    if wait is not None and launch.stop_grace_s + CLOSING_S > wait:
        yield Problem(
            key="launch.stop_grace_s",
            because=f"but Slurm kills a cancelled or preempted job {wait:g} s after it asked for its end "
            f"(launch.slurm.kill_wait_s), and the nodes need {CLOSING_S:g} s to hand in their codes",
            allowed=f"at most {max(1.0, wait - CLOSING_S):g}; or the site's larger launch.slurm.kill_wait_s",
        )
    elif wait is not None and launch.stop_grace_s + budget + CLOSING_S > wait:
        yield Problem(
            key="launch.save_budget_s",
            because=f"and with launch.stop_grace_s={launch.stop_grace_s:g} a save may end later than Slurm's SIGKILL, "
            f"{wait:g} s after it asked for an end (launch.slurm.kill_wait_s)",
            allowed=f"null or at most {wait - CLOSING_S - launch.stop_grace_s:g}; a larger launch.slurm.kill_wait_s, "
            "if it is the site's; or launch.slurm.kill_wait_s=null, if a cancelled or preempted job need not save",
        )
    for name, reference in launch.secrets.items():
        if kubernetes_secret(reference) is not None:
            yield Problem(
                key="launch.secrets",
                because=f"and {name} is an entry of a Kubernetes secret, which Slurm does not have",
                allowed=f"env:{name}, the variable of the shell that submits",
            )
    yield from _slurm_container_problems(config)


def _slurm_container_problems(config: TrainConfig) -> Iterator[Problem]:
    launch, container = config.launch, config.launch.slurm.container
    if container == "none":
        for key, value in (("launch.image", launch.image), ("launch.mounts", launch.mounts)):
            if value:
                yield Problem(
                    key="launch.slurm.container",
                    because=f"but {key} is given",
                    allowed="pyxis or apptainer; or no image",
                )
        return
    if launch.image is None:
        yield Problem(key="launch.image", because=f"but launch.slurm.container is {container}", allowed="an image")
    seen = [target for source, target, _ in map(mount_parts, launch.mounts) if source == target]
    if not is_below(config.run.output_dir, seen):
        yield Problem(
            key="run.output_dir",
            because="and the batch script, outside the container, reads the job's verdict beside it",
            allowed="an absolute path in one of launch.mounts whose source and target are the same",
        )


def _kubernetes_problems(config: TrainConfig, target: Target) -> Iterator[Problem]:
    launch, options = config.launch, config.launch.kubernetes
    if launch.image is None or "@sha256:" not in launch.image:
        yield Problem(
            key="launch.image",
            because="and pods need one whose digest is fixed, so that all nodes run the same program",
            allowed="a name with its @sha256: digest",
        )
    if launch.mounts:
        yield Problem(
            key="launch.mounts",
            because="which are folders of a host",
            allowed="[]; pods mount launch.kubernetes.claims",
        )
    for name, reference in launch.secrets.items():
        if kubernetes_secret(reference) is None:
            yield Problem(
                key="launch.secrets",
                because=f"and {name} is a variable of the shell that submits, which pods do not have",
                allowed=f"k8s:SECRET/KEY for {name}",
            )
    for key, path in (
        ("run.output_dir", config.run.output_dir),
        ("data.corpora", next(iter(config.data.corpora.values()))),
        ("launch.metrics_folder", launch.metrics_folder),
    ):
        if path is not None and not is_below(path, options.claims.values()):
            yield Problem(
                key=key,
                because="which lies on no volume of the pods",
                allowed="an absolute path in a folder of launch.kubernetes.claims",
            )
    if target == "trainjob":
        yield from _trainjob_problems(launch)


def _trainjob_problems(launch: LaunchConfig) -> Iterator[Problem]:
    """Settings that only the runtime decides, which an administrator installs."""
    if launch.max_restarts != _RUNTIME_RESTARTS:
        yield Problem(
            key="launch.max_restarts",
            because="but a TrainJob takes it from its runtime",
            allowed=f"{_RUNTIME_RESTARTS}, as in the runtime that is shipped; or a JobSet",
        )
    fixed = {
        "launch.kubernetes.priority_class": launch.kubernetes.priority_class,
        "launch.workdir": launch.workdir,
    }
    for key, value in fixed.items():
        if value is not None:
            yield Problem(
                key=key, because="but a TrainJob takes it from its runtime or image", allowed="null; or a JobSet"
            )
