"""Number formats."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The number format of activations and gradients."""

    compute: str = identity(
        "number format of weights and activations; with bf16 Adam updates float32 master weights, gradients are summed "
        "and the loss is computed in float32, and checkpoints hold the masters",
        default="fp32",
        choices=("fp32", "bf16"),
    )
