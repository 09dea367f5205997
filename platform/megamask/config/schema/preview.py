"""Texts that the network writes during training."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """What the network is asked to write while it learns, for a person to read; it never changes the training loss."""

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
