"""A run's config as a job for one scheduler: rendered, checked, written or submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.config.dump import documents_to_yaml
from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import refuse_first, validate_train
from megamask.config.validate_launch import Target, validate_launch
from megamask.errors import UsageError
from megamask.launch import jobset, lint, scheduler, slurm, trainjob
from megamask.launch.from_config import job_from_config
from megamask.launch.job import Job
from megamask.planning.capability import planned
from megamask.planning.capability import problems as capability_problems
from megamask.planning.gpus import GPUS
from megamask.storage.durable import storage_errors, write_atomic


def render_job(
    target: Target, path: str, overrides: Sequence[str], *, output: str | None, submit: bool, check: bool
) -> dict[str, Any]:
    """Render the job of a config; write it, ask the scheduler about it, or submit it.

    Returns: name, target, nodes, ranks_per_node, run_dir, text; written, the file; asked, what the scheduler answered
        to a check, None where its command is missing; submitted, what it answered to the submission.
    Raises:
        UsageError: the config makes no job for this scheduler, or the scheduler refuses it.
        StorageError: the output cannot be written.
    """
    loaded = load_train_config(path, overrides)
    validate_train(loaded.config, loaded.origins)
    validate_launch(loaded.config, loaded.origins, target)
    if target == "slurm":
        _check_gpu(loaded.config, loaded.origins)
    job = job_from_config(loaded.config, target, path=path, overrides=overrides)
    text = _text(job, target, loaded.config)
    answer: dict[str, Any] = {
        "name": job.name,
        "target": target,
        "nodes": job.nodes,
        "ranks_per_node": job.ranks_per_node,
        "run_dir": job.run_dir,
        "text": text,
        "written": None,
        "asked": None,
        "submitted": None,
    }
    kind = "slurm" if target == "slurm" else "kubernetes"
    if check:
        answer["asked"] = scheduler.ask(scheduler.TEST[kind], text, required=False)
    if output is not None:
        with storage_errors(f"writing {output}"):
            write_atomic(Path(output), text.encode())
        answer["written"] = output
    if submit:
        scheduler.refuse_missing_secrets(job)
        answer["submitted"] = scheduler.ask(scheduler.SUBMIT[kind], text, required=True)
    return answer


def _check_gpu(config: TrainConfig, origins: Mapping[str, str]) -> None:
    """Refuse number formats and layers that the GPUs of launch.slurm.gpu_type cannot run; other types are not known."""
    gpu = GPUS.get((config.launch.slurm.gpu_type or "").lower())
    if gpu is not None:
        found = planned(gpu.architecture)
        experts = config.model.num_experts
        refuse_first(capability_problems(config.precision, config.device, found, num_experts=experts), config, origins)


def _text(job: Job, target: Target, config: TrainConfig) -> str:
    if target == "slurm":
        return slurm.render(job)
    objects = {"jobset": jobset.render, "trainjob": trainjob.render}[target](job)
    problems = lint.problems(objects, stop_s=config.launch.stop_grace_s + config.launch.effective_save_budget_s)
    if problems:
        raise UsageError(f"{problems[0]}. Nothing was started.", hint="`megamask explain launch` shows the settings")
    return documents_to_yaml(objects)
