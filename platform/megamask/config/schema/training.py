"""How long and in which batches a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import extendable, identity, operational


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps and batch shapes; batch sizes count samples (a complementary pair is one sample)."""

    steps: int = extendable("optimizer steps of the whole run", minimum=1, unit="steps")
    stop_after_step: int | None = operational(
        "end this attempt cleanly after this step, with a checkpoint; the schedule still aims at training.steps",
        default=None,
        minimum=1,
        unit="steps",
    )
    global_batch_size: int = identity(
        "samples of one optimizer step, all ranks together; under a ramp, of its last level", minimum=1, unit="samples"
    )
    batch_size_ramp_start: int | None = identity(
        "samples of the first steps, from which the batch grows to global_batch_size; null switches the ramp off",
        default=None,
        minimum=1,
        unit="samples",
    )
    batch_size_ramp_increment: int | None = identity(
        "samples that the batch grows by from one level of the ramp to the next",
        default=None,
        minimum=1,
        unit="samples",
    )
    batch_size_ramp_samples: int | None = identity(
        "samples of the ramp, shared equally by the levels below the last, each share rounded up to whole batches",
        default=None,
        minimum=1,
        unit="samples",
    )
    micro_batch_size: int = operational(
        "samples of one forward pass of a data-parallel rank; a step accumulates the gradients of global_batch_size / "
        "(data_parallel_size * micro_batch_size) passes, and how many changes neither loss nor weights",
        default=1,
        minimum=1,
        unit="samples",
    )
    sequence_length: int = identity("tokens of a row", minimum=1, unit="tokens")
    head_capacity: int | None = operational(
        "rows per sample that the output layer computes; null means sequence_length, which always suffices",
        default=None,
        minimum=1,
        unit="rows",
    )
