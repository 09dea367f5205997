"""The subject of a plan, from a config: what `megamask plan` and `megamask train --check` plan."""

from __future__ import annotations

from megamask.config.rules.block_schedule import block_schedule_problems
from megamask.config.schema.roots import TrainConfig
from megamask.models.spec import ModelSpec
from megamask.objectives.schedule import largest_shape, phases_of
from megamask.planning.subject import Subject
from megamask.training.batch_size import first_step


def subject_of(config: TrainConfig, spec: ModelSpec) -> Subject:
    """Return the numbers that a plan reads of a config: those of its largest phase."""
    training = config.training
    objective, length = config.objective, training.sequence_length
    settings = objective.settings()
    if any(block_schedule_problems(objective.block_schedule, length)):  # a search ignores what no layout can mend
        settings["block_schedule"] = []
    phases = phases_of(settings, length, lambda amount, unit: first_step(amount, unit, training))
    shape = largest_shape(phases, length)
    return Subject(
        spec=spec,
        shape=shape,
        axes=config.layout.axis_sizes,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        compute=config.precision.compute,
        head_rows=shape.scored_positions,
        head_chunk_rows=training.head_chunk_rows,
        has_fp8=config.precision.fp8 != "none",
        recompute=training.recompute,
        has_ring=config.device.attention == "te",
        is_overlapped=config.device.overlap_gradient_reduce,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )
