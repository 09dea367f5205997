"""AdamW with FusedAdam's interface and state layout, for machines without Transformer Engine or Apex.

The layout matters more than the arithmetic: FusedAdam keeps one step count per parameter group, torch.optim.AdamW one
tensor per parameter. With ours a checkpoint does not depend on which Adam wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Adam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101): decoupled weight decay, bias correction.

    Each parameter has the states exp_avg and exp_avg_sq; each group counts its updates under "step".

    Args:
        params: tensors or groups of them.
        lr, betas, eps, weight_decay, bias_correction: as FusedAdam's.
        adam_w_mode: must be true; the other form (L2 regularisation) is not built.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("Adam with L2 regularisation is not built; use decoupled weight decay")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure has no use here
        """One update of every parameter that has a gradient; the order of operations is torch.optim.AdamW's."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        grads = [param.grad for param in params if param.grad is not None]
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        beta1, beta2 = group["betas"]
        step = group["step"] if group["bias_correction"] else float("inf")
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1 - beta1**step))
