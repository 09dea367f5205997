"""Rules between a model, a row's length and the sizes of the mesh axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamask.config.rules.problem import Problem, divisors, listed

# The shape law: lengths are multiples of lcm(16, 2 * tensor-parallel size).
SHAPE_UNIT = 16


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The numbers that a layout divides among its ranks.

    Args:
        num_query_groups: key and value heads, defaults resolved.
        vocab_padding_multiple: the padded vocabulary is a multiple of this.
        sequence_length: tokens of a row.
    """

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_padding_multiple: int
    sequence_length: int

    def by_tensor_ranks(self) -> Iterator[tuple[str, int]]:
        """(key, value) of each number that tensor-parallel ranks divide equally."""
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_padding_multiple"):
            yield f"model.{name}", getattr(self, name)


def length_unit(tensor_parallel_size: int) -> int:
    """The number that sequence lengths are multiples of, by the shape law."""
    return math.lcm(SHAPE_UNIT, 2 * tensor_parallel_size)


def allowed_tensor_parallel_sizes(shared: Shared) -> list[int]:
    """The tensor-parallel sizes that divide everything which such ranks share, ascending."""
    common = math.gcd(*(count for _, count in shared.by_tensor_ranks()))
    return [size for size in divisors(common) if shared.sequence_length % length_unit(size) == 0]


def length_problems(key: str, length: int, *, tensor_parallel_size: int | None = None) -> Iterator[Problem]:
    """A row's length that the shape law does not allow under any layout.

    Args:
        key: the key that gave the length.
        tensor_parallel_size: of the layout, where one is known; the proposed lengths fit it.
    """
    if length % SHAPE_UNIT == 0:
        return
    unit = length_unit(tensor_parallel_size or 1)
    why = "2" if tensor_parallel_size is None else "2 * layout.tensor_parallel_size"
    below, above = length - length % unit, length - length % unit + unit
    nearest = f"{below} or {above}" if below else f"{above}"
    yield Problem(
        key=key,
        because=f"which is not a multiple of {unit} = lcm({SHAPE_UNIT}, {why})",
        allowed=f"a multiple of {unit}; the nearest are {nearest}",
    )


def layout_problems(
    shared: Shared, *, tensor_parallel_size: int, pipeline_parallel_size: int, sequence_parallel: bool
) -> Iterator[Problem]:
    """Sizes of axes that do not divide what their ranks share."""
    tensor = tensor_parallel_size
    because = [f"but {key} is {count}" for key, count in shared.by_tensor_ranks() if count % tensor != 0]
    if shared.sequence_length % length_unit(tensor) != 0:
        because.append(
            f"but training.sequence_length is {shared.sequence_length}, not a multiple of lcm({SHAPE_UNIT}, "
            f"2 * {tensor})"
        )
    for reason in because:
        sizes = listed(allowed_tensor_parallel_sizes(shared))
        yield Problem(key="layout.tensor_parallel_size", because=reason, allowed=sizes)
    if shared.num_layers % pipeline_parallel_size != 0:
        yield Problem(
            key="layout.pipeline_parallel_size",
            because=f"but model.num_layers is {shared.num_layers}",
            allowed=listed(divisors(shared.num_layers)),
        )
    if sequence_parallel and tensor == 1:
        yield Problem(
            key="layout.sequence_parallel",
            because="but layout.tensor_parallel_size is 1, so no ranks share a sequence",
            allowed="false, or a layout.tensor_parallel_size above 1",
        )
