"""Delayed scaling's state inside Transformer Engine's modules. Imported only where the library's layers run.

The library keeps histories [H, operands] and scales in `fp8_meta`: forward ones with the columns input, weight, output
(unused), backward ones with the columns gradient of the output, gradient of the input (unused).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from megatron.core.fp8_utils import get_fp8_recipe

from megamask.engine.layers.fp8_recipes import amax_of
from megamask.engine.layers.fp8_state import BACKWARD, FORWARD


class TeScales:
    """The state of one of the library's linear modules."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As Scales."""
        forward, backward = self._sides()
        history = torch.cat((forward.amax_history[:, :2].t(), backward.amax_history[:, :1].t()))
        return history.contiguous(), torch.cat((forward.scale[:2], backward.scale[:1]))

    def write(self, amax_history: torch.Tensor, scale: torch.Tensor) -> None:
        """As Scales."""
        for side, operands in zip(self._sides(), (FORWARD, BACKWARD), strict=True):
            num_operands = operands.stop - operands.start
            side.amax_history[:, :num_operands] = amax_history[operands].t()
            side.scale[:num_operands] = scale[operands]

    def _sides(self) -> tuple[Any, Any]:
        meta = self._module.fp8_meta
        return meta["scaling_fwd"], meta["scaling_bwd"]


@torch.no_grad()
def te_scales(config: Any, modules: list[Any]) -> list[TeScales]:
    """Make the states of linear modules, which the library does in a context only."""
    with te.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(config)):
        for module in modules:
            module.init_fp8_metadata(num_gemms=1)
    return [TeScales(module) for module in modules]


@contextlib.contextmanager
def calibrating(configs: Sequence[Any], modules: list[Any]) -> Iterator[None]:
    """Inside, passes record magnitudes and quantise nothing.

    The library's own calibration records nothing: outside an FP8 context version 2.20.2 hands its modules no quantizers
    (`_get_quantizers` of module/linear.py). Operands are looked at as they reach the modules; the largest of all passes
    is kept.
    """
    fp8 = configs[0].fp8
    hooks = [module.register_full_backward_pre_hook(_record_gradient) for module in modules]
    hooks += [module.register_forward_pre_hook(_record_operands) for module in modules]
    _set_fp8(configs, None)  # megatron-core then enters no context of its own
    try:
        yield
    finally:
        _set_fp8(configs, fp8)
        for hook in hooks:
            hook.remove()


def _set_fp8(configs: Sequence[Any], fp8: str | None) -> None:
    for config in configs:
        config.fp8 = fp8


@torch.no_grad()
def _record_operands(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    x = inputs[0]
    if (norm := getattr(module, "layer_norm_weight", None)) is not None:  # fused: the product's input is its output
        x = F.rms_norm(x, norm.shape, norm, module.eps)
    amax = torch.stack((amax_of(x), amax_of(module.weight)))
    now = module.fp8_meta["scaling_fwd"].amax_history[0, :2]
    now.copy_(torch.maximum(now, amax))


def _record_gradient(module: Any, gradients: tuple[torch.Tensor | None, ...]) -> None:
    if (gradient := gradients[0]) is not None:
        now = module.fp8_meta["scaling_bwd"].amax_history[0, 0]
        now.copy_(torch.maximum(now, amax_of(gradient)))
