"""Published tensors from canonical ones: rows above one another and stacks, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamask.models.families.published import PublishedTensor


def join(tensor: PublishedTensor, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A published tensor in its number format.

    Memory: the tensor, and one of its parts.

    Args:
        read: returns a canonical tensor by name.
    """
    if tensor.how == "same":
        return read(tensor.parts[0][0]).to(dtype)
    value = torch.empty(tensor.shape, dtype=dtype)
    first = 0
    for number, (name, shape) in enumerate(tensor.parts):
        if tensor.how == "stack":
            value[number] = read(name)
        else:
            value[first : first + shape[0]] = read(name)
            first += shape[0]
    return value
