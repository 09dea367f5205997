"""Rules between a model, a row's length and the sizes of the mesh axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamask.config.rules.problem import Problem, divisors, listed

# The shape law: lengths are multiples of lcm(16, 2 * context-parallel size * tensor-parallel size).
SHAPE_UNIT = 16
PIPELINE_SPLITS = ("layers", "balanced")


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


@dataclass(frozen=True, kw_only=True)
class AxisSizes:
    """The sizes of the mesh axes and how the pipeline is cut."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_split: str = "layers"

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are cut into."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size


def stage_sizes(num_layers: int, num_stages: int, split: str) -> list[int] | None:
    """Layers of each pipeline stage in the network's order, or None where they cannot be cut that way.

    Args:
        num_stages: pipeline ranks times virtual stages.
        split: "layers" gives each stage the same number of layers; "balanced" counts the embedding and the head as a
            layer each. A remainder goes to the first stages, because the head is the heavier of the two.
    """
    if split == "layers":
        return [num_layers // num_stages] * num_stages if num_layers % num_stages == 0 else None
    share, rest = divmod(num_layers + 2, num_stages)
    sizes = [share + (stage < rest) for stage in range(num_stages)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return sizes if min(sizes) > 0 else None


def length_unit(tensor_parallel_size: int, context_parallel_size: int = 1) -> int:
    """The number that sequence lengths are multiples of, by the shape law."""
    return math.lcm(SHAPE_UNIT, 2 * context_parallel_size * tensor_parallel_size)


def allowed_tensor_parallel_sizes(shared: Shared, *, context_parallel_size: int = 1) -> list[int]:
    """The tensor-parallel sizes that divide everything which such ranks share, ascending."""
    common = math.gcd(*(count for _, count in shared.by_tensor_ranks()))
    return [size for size in divisors(common) if shared.sequence_length % length_unit(size, context_parallel_size) == 0]


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


def layout_problems(shared: Shared, sizes: AxisSizes) -> Iterator[Problem]:
    """Sizes of axes that do not divide what their ranks share; of several allowed values the nearest is named."""
    yield from _tensor_problems(shared, sizes)
    yield from _context_problems(shared, sizes)
    yield from _pipeline_problems(shared, sizes)
    if sizes.sequence_parallel and sizes.tensor_parallel_size == 1:
        yield Problem(
            key="layout.sequence_parallel",
            because="but layout.tensor_parallel_size is 1, so no ranks share a sequence",
            allowed="false, or a layout.tensor_parallel_size above 1",
        )


def _tensor_problems(shared: Shared, sizes: AxisSizes) -> Iterator[Problem]:
    tensor = sizes.tensor_parallel_size
    because = [f"but {key} is {count}" for key, count in shared.by_tensor_ranks() if count % tensor != 0]
    if shared.sequence_length % length_unit(tensor) != 0:
        because.append(
            f"but training.sequence_length is {shared.sequence_length}, not a multiple of lcm({SHAPE_UNIT}, "
            f"2 * {tensor})"
        )
    for reason in because:
        allowed = allowed_tensor_parallel_sizes(shared)
        yield Problem(key="layout.tensor_parallel_size", because=reason, allowed=listed(allowed, tensor))


def _context_problems(shared: Shared, sizes: AxisSizes) -> Iterator[Problem]:
    context, tensor, length = sizes.context_parallel_size, sizes.tensor_parallel_size, shared.sequence_length
    if context == 1 or length % length_unit(tensor) != 0 or length % length_unit(tensor, context) == 0:
        return
    allowed = [size for size in divisors(length) if length % length_unit(tensor, size) == 0]
    yield Problem(
        key="layout.context_parallel_size",
        because=f"but training.sequence_length is {length}, not a multiple of lcm({SHAPE_UNIT}, 2 * {context} * "
        f"layout.tensor_parallel_size = {tensor}), because each rank takes two equal pieces of a row",
        allowed=listed(allowed, context),
    )


def _pipeline_problems(shared: Shared, sizes: AxisSizes) -> Iterator[Problem]:
    pipeline, virtual, layers = sizes.pipeline_parallel_size, sizes.virtual_pipeline_parallel_size, shared.num_layers
    if virtual > 1 and pipeline == 1:
        yield Problem(
            key="layout.virtual_pipeline_parallel_size",
            because="but layout.pipeline_parallel_size is 1, so there is no pipeline to interleave",
            allowed="1, or a layout.pipeline_parallel_size above 1",
        )
    elif stage_sizes(layers, sizes.num_stages, sizes.pipeline_split) is None:
        is_virtual = virtual > 1 and stage_sizes(layers, pipeline, sizes.pipeline_split) is not None
        given, other = (virtual, pipeline) if is_virtual else (pipeline, 1)
        fits = [
            size for size in range(1, layers + 1) if stage_sizes(layers, size * other, sizes.pipeline_split) is not None
        ]
        way = "" if sizes.pipeline_split == "layers" else ", and embedding and head count as a layer each"
        yield Problem(
            key="layout.virtual_pipeline_parallel_size" if is_virtual else "layout.pipeline_parallel_size",
            because=f"but model.num_layers is {layers}"
            + (f" on {pipeline} pipeline ranks" if is_virtual else "")
            + way,
            allowed=listed(fits, given)
            + (
                "; or layout.pipeline_split=balanced, which allows other sizes" if _balanced_fits(layers, sizes) else ""
            ),
        )


def _balanced_fits(num_layers: int, sizes: AxisSizes) -> bool:
    return sizes.pipeline_split == "layers" and stage_sizes(num_layers, sizes.num_stages, "balanced") is not None
