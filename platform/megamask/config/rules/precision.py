"""Shapes that the FP8 kernels' matrix products take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megamask.config.rules.problem import Problem

# Of cuBLASLt: every dimension of an FP8 product. Blockwise scales cover 128 values.
_UNIT = {"blockwise": 128}
_DEFAULT_UNIT = 16


@dataclass(frozen=True, kw_only=True)
class Products:
    """The dimensions of the layers' products on one rank, by the key that gives them.

    Args:
        features: key -> features of this rank.
        positions: of a micro-batch's rows.
    """

    features: dict[str, int]
    positions: int

    @classmethod
    def of(cls, config: Any) -> Products:
        """Of a training config."""
        model, tensor = config.model, config.layout.tensor_parallel_size
        head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        heads = (model.num_attention_heads + 2 * model.effective_query_groups) * head_dim
        return cls(
            features={
                "model.hidden_size": model.hidden_size,
                "model.num_attention_heads": heads // tensor,
                "model.ffn_hidden_size": model.ffn_hidden_size // tensor,
            },
            positions=config.training.micro_batch_size * config.training.sequence_length,
        )


def product_problems(recipe: str, products: Products) -> Iterator[Problem]:
    """Dimensions that are not multiples of what the kernels take."""
    unit = _UNIT.get(recipe, _DEFAULT_UNIT)
    for key, size in products.features.items():
        if size % unit != 0:
            yield Problem(
                key=key,
                because=f"which gives a tensor-parallel rank products of {size} features; the kernels of "
                f"precision.fp8={recipe} take multiples of {unit}",
                allowed=f"what gives a multiple of {unit}, or another precision.fp8",
            )
    if products.positions % unit != 0:
        yield Problem(
            key="training.micro_batch_size",
            because=f"which gives products of {products.positions} positions; the kernels of precision.fp8={recipe} "
            f"take multiples of {unit}",
            allowed=f"what gives a multiple of {unit}, or another precision.fp8",
        )
