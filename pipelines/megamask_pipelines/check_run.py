"""The job of `megamask train --check`: open what a run reads and report its size, without training."""

from __future__ import annotations

import contextlib
from typing import Any

from megamask.config.schema.roots import TrainConfig
from megamask.models.counts import flops_per_token, parameter_count
from megamask.objectives.schedule import largest_shape
from megamask.planning.assumptions import Assumptions
from megamask.planning.plan import fullest_rank
from megamask.runs.layout import run_path
from megamask.training.batch_size import consumed_before
from megamask.training.run_data import RunData, objective_phases
from megamask_pipelines.subject import subject_of

_BYTES_PER_WEIGHT = 12  # float32 weight and the two moments of Adam
# what is counted alone: nothing of a device's context or its allocator
_NOTHING_ASSUMED = Assumptions(context_bytes=0.0, communicator_bytes=0.0, fragmentation=0.0)


def check_run(config: TrainConfig) -> dict[str, Any]:
    """Open the corpora of a validated config and count.

    Nothing is claimed and nothing is written.

    Returns: run_dir, processes, parameters, flops_per_token (training, per position of the network),
        flops_per_step (of the last batch size), rows, tokens (of the training split), steps, steps_per_epoch (of the
        last batch size), epochs (of the run), micro_batches (per data-parallel rank and step), checkpoint_bytes,
        per_rank (memory of the fullest rank by cause, as `megamask plan` counts it; nothing of the device's own).
    Raises:
        MegamaskError: a corpus or a prompt refuses.
    """
    with contextlib.ExitStack() as stack:
        data = RunData(config, stack)
        split = data.train.manifest.split("train")
    training, layout = config.training, config.layout
    shape = largest_shape(objective_phases(config), training.sequence_length)
    flops = flops_per_token(
        data.spec, scored_fraction=shape.scored_fraction, attended_fraction=shape.attended_fraction
    ).training
    batch, parameters = training.global_batch_size, parameter_count(data.spec)
    return {
        "run_dir": str(run_path(config.run.output_dir, config.run.name)),
        "processes": layout.num_processes,
        "parameters": parameters,
        "flops_per_token": flops,
        "flops_per_step": flops * batch * shape.num_views * shape.input_length,
        "rows": split.num_rows,
        "tokens": split.num_tokens,
        "steps": training.steps,
        "steps_per_epoch": split.num_rows / batch,
        "epochs": consumed_before(training.steps + 1, training) / split.num_rows,
        "micro_batches": batch // (layout.data_parallel_size * training.micro_batch_size),
        "checkpoint_bytes": parameters * _BYTES_PER_WEIGHT,
        "per_rank": fullest_rank(subject_of(config, data.spec), _NOTHING_ASSUMED).to_json(),
    }


def render_check(facts: dict[str, Any]) -> str:
    """Return the answer for people."""
    rank = facts["per_rank"]
    causes = ("parameters", "gradients", "optimizer", "activations", "logits")
    memory = ", ".join(f"{cause} {rank[f'{cause}_bytes'] / 1e6:,.1f}" for cause in causes)
    processes = "1 process" if facts["processes"] == 1 else f"{facts['processes']} processes"
    return "\n".join(
        (
            f"{facts['run_dir']} can be trained; nothing was started",
            f"  network      {facts['parameters']:,} parameters, {facts['flops_per_token']:.3g} FLOPs per position",
            f"  corpus       {facts['rows']:,} rows, {facts['tokens']:,} tokens for training",
            f"  run          {facts['steps']:,} steps of {facts['flops_per_step']:.3g} FLOPs, "
            f"{facts['steps_per_epoch']:,.1f} steps per epoch, {facts['epochs']:.2f} epochs",
            f"  layout       {processes}, {facts['micro_batches']} micro-batches per step on each data-parallel rank",
            f"  memory       {rank['total_bytes'] / 1e6:,.1f} MB on rank {rank['rank']}, the fullest ({memory})",
            f"  checkpoint   {facts['checkpoint_bytes'] / 1e6:,.1f} MB",
        )
    )
