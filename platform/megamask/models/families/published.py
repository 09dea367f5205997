"""Published tensors as they are made of canonical ones.

A published tensor is one canonical tensor, or several of them one above the other (fused queries, keys and values), or
several stacked along a new first dimension (merged experts). No arithmetic is involved: bytes move and none changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megamask.models.families.base import Family
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec

_QUERY_KEY_VALUE = re.compile(r"(model\.layers\.\d+\.)self_attn\.[qkv]_proj\.weight")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class PublishedTensor:
    """A tensor of a published model.

    Args:
        name: as published.
        parts: canonical tensors, in order, with the shape of each.
        how: "same" for one part, "rows" for parts above one another, "stack" for a new first dimension.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    how: Literal["same", "rows", "stack"] = "same"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the published tensor."""
        shapes = [shape for _, shape in self.parts]
        if self.how == "stack":
            return (len(shapes), *shapes[0])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def published_tensors(
    family: Family, spec: ModelSpec, *, has_merged_experts: bool = False
) -> dict[str, PublishedTensor]:
    """Every tensor of a network in a family's layout, by its published name, in the network's order.

    Args:
        has_merged_experts: a layer's experts are one tensor a projection, as dFactory trains them.
    """
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    how: dict[str, Literal["same", "rows", "stack"]] = {}
    for name, shape in canonical_shapes(spec).items():
        published, kind = _place(family, name, has_merged_experts=has_merged_experts)
        parts.setdefault(published, []).append((name, tuple(shape)))
        how[published] = kind
    return {name: PublishedTensor(name=name, parts=tuple(found), how=how[name]) for name, found in parts.items()}


def _place(family: Family, name: str, *, has_merged_experts: bool) -> tuple[str, Literal["same", "rows", "stack"]]:
    if family.fused_name is not None and (match := _QUERY_KEY_VALUE.fullmatch(name)):
        return match[1] + family.fused_name, "rows"
    if has_merged_experts and (match := _EXPERT.fullmatch(name)):
        return f"{match[1]}.{match[2]}", "stack"
    return family.hub_name(name), "same"
