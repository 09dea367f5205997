"""Length and batches of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.batch import batch_levels, ramp_problems
from megamask.config.rules.layout import length_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import extendable, identity, operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Steps and batch shapes; batch sizes count samples (a complementary pair is one sample)."""

    steps: int = extendable("optimizer steps of the run", minimum=1, unit="steps")
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
        "samples of the ramp, shared equally by the levels below the last, each share rounded up to full batches",
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
    head_chunk_rows: int = operational(
        "rows that the output layer and the loss compute at a time; memory for logits grows with it, and chunks that "
        "hold no scored token are skipped. It changes the order of sums, so the last bits of a loss",
        default=1024,
        minimum=1,
        unit="rows",
    )

    recompute: str = operational(
        "activations that the backward pass computes again instead of keeping them: selective those of attention and "
        "of dense feed-forward parts, full those of complete layers, experts included. It changes memory and speed, "
        "and no bit of the result",
        default="none",
        choices=("none", "selective", "full"),
    )

    router_balance_over: str = identity(
        "tokens that the loss of model.router_balance_weight spreads over the experts: row are those of each row, "
        "micro_batch those of each micro-batch together, whose number and place are the layout's",
        default="row",
        choices=("row", "micro_batch"),
    )
    allow_layout_dependent: bool = operational(
        "allow a setting whose losses and weights depend on training.micro_batch_size and layout.*; it is "
        "training.router_balance_over=micro_batch",
        default=False,
    )

    def batch_levels(self) -> range:
        """Every size that a step's batch may have, ascending; one without a ramp."""
        return batch_levels(
            global_batch_size=self.global_batch_size,
            start=self.batch_size_ramp_start,
            increment=self.batch_size_ramp_increment,
        )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """The length of a row, the ramp and the last step."""
        yield from length_problems(
            "training.sequence_length",
            self.sequence_length,
            tensor_parallel_size=config.layout.tensor_parallel_size,
        )
        yield from ramp_problems(
            global_batch_size=self.global_batch_size,
            start=self.batch_size_ramp_start,
            increment=self.batch_size_ramp_increment,
            samples=self.batch_size_ramp_samples,
        )
        if self.router_balance_over != "row":
            yield from self._balance_problems(config)
        if self.stop_after_step is not None and self.stop_after_step > self.steps:
            yield Problem(
                key="training.stop_after_step",
                because=f"but training.steps is {self.steps}",
                allowed=f"1 to {self.steps}, or null",
            )

    def _balance_problems(self, config: TrainConfig) -> Iterator[Problem]:
        """A balance loss of micro-batches without an effect or without permission."""
        key = "training.router_balance_over"
        if config.model.num_experts == 0 or config.model.router_balance_weight == 0:
            yield Problem(
                key=key,
                because=f"but model.num_experts is {config.model.num_experts} and model.router_balance_weight "
                f"{config.model.router_balance_weight:g}, so that there is no such loss",
                allowed="row",
            )
        elif not self.allow_layout_dependent:
            yield Problem(
                key=key,
                because="which makes losses and weights depend on training.micro_batch_size and the layout, but "
                "training.allow_layout_dependent is false",
                allowed="row; or training.allow_layout_dependent=true",
            )
