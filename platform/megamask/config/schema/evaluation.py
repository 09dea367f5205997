"""The likelihood bound, measured during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity, operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig

# The noise law numbers the draws of a row: 256 * draw + purpose is one 32-bit word.
_DRAWS_LIMIT = 2**24


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Estimation of the bound on held-out text; it never changes the training loss."""

    every_steps: int | None = operational(
        "measure the bound on the validation split every so many steps; null means never",
        default=None,
        minimum=1,
        unit="steps",
    )
    rows: int = operational(
        "validation rows of each corpus to score, from the first on; at most as many as there are",
        default=16,
        minimum=1,
        unit="rows",
    )
    draws: int = operational("masks per row in one replicate", default=4, minimum=1, unit="masks")
    replicates: int = operational(
        "independent replicates; the standard error comes from their spread", default=4, minimum=2, unit="replicates"
    )
    pair_variance_draws: int | None = operational(
        "measure with so many pairs of each row how much the complementary pair lowers the loss's variance; null: not",
        default=None,
        minimum=3,
        unit="pairs",
    )
    clip_search_draws: int | None = operational(
        "search, with so many blocks of each row, the window of mask probabilities in which a block loss varies least, "
        "for objective.clip_low and clip_high; null: not",
        default=None,
        minimum=1,
        unit="blocks",
    )
    seed: int | None = identity(
        "seed of the evaluation masks; null means run.seed", default=None, minimum=0, maximum=2**64 - 1
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Fewer draws of a row than the noise law can number; pairs and blocks only where there are some."""
        if self.clip_search_draws is not None and config.objective.name != "block":
            yield Problem(
                key="evaluation.clip_search_draws",
                because=f"but objective.name is {config.objective.name}, which has no blocks",
                allowed="null; or an integer >= 1 with objective.name=block",
            )
        if self.pair_variance_draws is not None and not config.objective.complementary:
            yield Problem(
                key="evaluation.pair_variance_draws",
                because="but objective.complementary is not true, so there is no pair to measure",
                allowed="null; or an integer >= 3 with objective.complementary=true",
            )
        if self.draws * self.replicates >= _DRAWS_LIMIT:
            yield Problem(
                key="evaluation.draws",
                because=f"which times evaluation.replicates = {self.replicates} is more than the noise law numbers",
                allowed=f"at most {(_DRAWS_LIMIT - 1) // self.replicates}",
            )
