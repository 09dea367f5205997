"""Number formats."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Section):
    """The number format of activations and gradients."""

    compute: str = identity(
        "number format of weights and activations; with bf16 Adam updates float32 master weights, gradients are summed "
        "and the loss is computed in float32, and checkpoints hold the masters",
        default="fp32",
        choices=("fp32", "bf16"),
    )
