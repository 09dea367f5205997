"""Cutting published tensors into canonical ones and joining them again: rows and stacks, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megamask.conversion.hub_folder import HubFolder
from megamask.models.families.experts import ExpertFamily, ExpertSizes, Joined


def layout_of(folder: HubFolder, family: ExpertFamily, sizes: ExpertSizes) -> list[Joined]:
    """The published tensors of a folder, whose experts may be merged or not.

    Raises:
        DataIntegrityError: the folder's tensors are neither; names them.
    """
    merged = family.tensors(sizes, merged_experts=True)
    has_merged = any(tensor.name in folder.tensor_names for tensor in merged if tensor.how == "stack")
    tensors = merged if has_merged else family.tensors(sizes)
    folder.check_names(tensor.name for tensor in tensors)
    return tensors


def cut(tensor: Joined, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The canonical tensors in a published one, as views."""
    if tensor.how == "stack":
        pieces = list(value.unbind(0))
    else:
        pieces = list(torch.split(value, [shape[0] for _, shape in tensor.parts]))
    return {name: piece for (name, _), piece in zip(tensor.parts, pieces, strict=True)}


def join(tensor: Joined, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A published tensor from its canonical ones."""
    pieces = [read(name) for name, _ in tensor.parts]
    if tensor.how == "same":
        return pieces[0]
    return torch.stack(pieces) if tensor.how == "stack" else torch.cat(pieces)


def canonical_tensors(folder: HubFolder, tensors: Sequence[Joined]) -> Mapping[str, torch.Tensor]:
    """Every canonical tensor of a folder; for small models and tests, all of them are in memory."""
    found: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        found |= cut(tensor, folder.tensor(tensor.name, tensor.shape))
    return found
