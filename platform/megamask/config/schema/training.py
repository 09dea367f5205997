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
    global_batch_size: int = identity("samples of one optimizer step, all ranks together", minimum=1, unit="samples")
    micro_batch_size: int = operational(
        "samples of one forward pass of a data-parallel rank", default=1, minimum=1, unit="samples"
    )
    sequence_length: int = identity("tokens of a row", minimum=1, unit="tokens")
    head_capacity: int | None = operational(
        "rows per sample that the output layer computes; null means sequence_length, which always suffices",
        default=None,
        minimum=1,
        unit="rows",
    )
