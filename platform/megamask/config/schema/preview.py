"""Texts that the network writes during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Section):
    """Sample texts during training, for a person to read; they never change the training loss."""

    every_steps: int | None = operational(
        "let the network continue the prompts every so many steps; null means never",
        default=None,
        minimum=1,
        unit="steps",
    )
    prompts: list[str] = operational("texts to continue; an empty one asks for text from nothing", default=[""])
    num_tokens: int = operational(
        "tokens to write after each prompt; the rest of the row stays masked", default=64, minimum=1, unit="tokens"
    )
    denoising_steps: int | None = operational(
        "forward passes for each prompt; null means one for each token", default=None, minimum=1, unit="steps"
    )
    temperature: float = operational(
        "0 takes the most probable token; otherwise Gumbel noise times this is added to the logits",
        default=0.0,
        minimum=0,
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Prompts and lengths; whether a prompt fits is known only with the tokenizer: training/previewing.py."""
        length = config.training.sequence_length
        if self.every_steps is None:
            return
        if not self.prompts:
            yield Problem(
                key="preview.prompts",
                because="so there is nothing to continue",
                allowed="at least one text (preview.prompts=[''] writes from nothing), or preview.every_steps=null",
            )
        if self.num_tokens > length:
            yield Problem(
                key="preview.num_tokens",
                because=f"but a row has training.sequence_length = {length} tokens, the prompt included",
                allowed=f"1 to {length}",
            )
        if self.denoising_steps is not None and self.denoising_steps > self.num_tokens:
            yield Problem(
                key="preview.denoising_steps",
                because=f"but each step writes a token at least, and preview.num_tokens is {self.num_tokens}",
                allowed=f"1 to {self.num_tokens}, or null",
            )
