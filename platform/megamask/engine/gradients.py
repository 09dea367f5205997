"""Weight gradients that are added to megatron-core's float32 buffers directly, not through autograd."""

from __future__ import annotations

import torch

_ANNOUNCES = "megamask_announces_gradient"


def announce_gradients(network: torch.nn.Module) -> None:
    """Make `taken` announce each weight's gradient: sums over ranks then begin during the backward pass."""
    for parameter in network.parameters():
        setattr(parameter, _ANNOUNCES, True)


def taken(weight: torch.Tensor) -> torch.Tensor | None:
    """Return what an autograd function returns for a weight whose gradient it has added to `main_grad` itself.

    That is nothing, unless the gradient must be announced: megatron-core's hook counts a weight as ready when a
    gradient arrives, and then needs one, which it does not add.
    """
    if not getattr(weight, _ANNOUNCES, False):
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight)
