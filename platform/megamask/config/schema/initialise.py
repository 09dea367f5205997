"""The start of a run from weights that exist: a published model, or a checkpoint of megamask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig

_SHIFT = re.compile(r"keep|drop|\{until_step: *([1-9]\d{0,17})\}")


@dataclass(frozen=True, kw_only=True)
class InitialiseConfig(Section):
    """First weights of a run, and what eases the step from an autoregressive network to a diffusion network."""

    source: str | None = identity(
        "first weights: hf:FOLDER, a published model in Hugging Face layout, or a run directory or checkpoint of "
        "megamask; null draws them from run.seed",
        default=None,
    )
    shift: str = identity(
        "whether logits go on predicting the next token where the source's do: keep, drop, or {until_step: N}, which "
        "keeps that for the first N steps",
        default="keep",
        pattern=_SHIFT.pattern,
        pattern_words="keep, drop, {until_step: N}",
        takes_mapping=True,
    )
    mask_row: str | None = identity(
        "first embedding of the mask token: unused (that of an id which no text has), mean (of all embeddings), or "
        "that of the id given; null takes the row of the source's own mask token, else unused",
        default=None,
        pattern=r"unused|mean|0|[1-9]\d{0,8}",
        pattern_words="unused, mean, an id",
    )
    allow_other_tokenizer: bool = identity(
        "a checkpoint of a run may be the source although the corpus has a tokenizer of another digest than that run; "
        "ids that both have must mean the same in any case",
        default=False,
    )
    attention_annealing_steps: int = identity(
        "steps over which causal attention opens: at step s each later position is seen with probability s / steps",
        default=0,
        minimum=0,
        unit="steps",
    )
    mask_ratio_warmup_steps: int = identity(
        "steps over which the largest noise level t rises from 0.001 to 1, all masked positions weighing 1 meanwhile",
        default=0,
        minimum=0,
        unit="steps",
    )
    embedding_noise_steps: int = identity(
        "first steps that add Gaussian noise to the embeddings of masked positions", default=0, minimum=0, unit="steps"
    )
    embedding_noise_std: float = identity(
        "standard deviation of that noise, in the embedding's own unit", default=0.1, above=0
    )

    @property
    def shift_until_step(self) -> int | None:
        """Last step with the shift, where `shift` limits it."""
        match = _SHIFT.fullmatch(self.shift)
        return int(match[1]) if match and match[1] else None

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Keys without a source, and those that the objective does not have."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, default in defaults.items():
            if self.source is None and name != "source" and getattr(self, name) != default:
                yield Problem(
                    key=f"initialise.{name}",
                    because="but initialise.source is null",
                    allowed=f"{default}, its default; or any value with initialise.source",
                )
        objective = config.objective.name
        needs = {
            "attention_annealing_steps": ("masked",),
            "mask_ratio_warmup_steps": ("masked", "block"),
            "embedding_noise_steps": ("masked", "block"),
        }
        for name, allowed in needs.items():
            if getattr(self, name) > 0 and objective not in allowed:
                yield Problem(
                    key=f"initialise.{name}",
                    because=f"but objective.name is {objective}",
                    allowed=f"0; or objective.name {' or '.join(allowed)}",
                )
        if self.shift != "keep" and objective == "autoregressive":
            yield Problem(
                key="initialise.shift",
                because="but objective.name is autoregressive, whose logits always predict the next token",
                allowed="keep",
            )
        if self.mask_ratio_warmup_steps > 0 and config.objective.complementary:
            yield Problem(
                key="initialise.mask_ratio_warmup_steps",
                because="but objective.complementary is true, whose second view masks what the first leaves visible",
                allowed="0; or objective.complementary=false",
            )
        if self.mask_ratio_warmup_steps > 0 and getattr(config.objective, "recipe", None) is not None:
            yield Problem(
                key="initialise.mask_ratio_warmup_steps",
                because=f"but objective.recipe is {config.objective.recipe}, which has its own weights",
                allowed="0; or objective.recipe=null",
            )

    def easing(self) -> dict[str, Any]:
        """The settings that change the rows of the first steps, by name; only those that do."""
        names = ("attention_annealing_steps", "mask_ratio_warmup_steps", "embedding_noise_steps")
        found = {name: getattr(self, name) for name in names if getattr(self, name) > 0}
        return found | ({"embedding_noise_std": self.embedding_noise_std} if self.embedding_noise_steps else {})
