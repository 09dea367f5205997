"""The likelihood bound, measured during training."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity, operational


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the bound on held-out text is estimated; it never changes the training loss."""

    every_steps: int | None = operational(
        "measure the bound on the validation split every so many steps; null means never",
        default=None,
        minimum=1,
        unit="steps",
    )
    rows: int = operational(
        "validation rows to score, from the first on; at most as many as there are", default=16, minimum=1, unit="rows"
    )
    draws: int = operational("masks per row in one replicate", default=4, minimum=1, unit="masks")
    replicates: int = operational(
        "independent replicates; the standard error comes from their spread", default=4, minimum=2, unit="replicates"
    )
    seed: int | None = identity(
        "seed of the evaluation masks; null means run.seed", default=None, minimum=0, maximum=2**64 - 1
    )
