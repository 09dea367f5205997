"""Time of a rank's own passes: from their beginning until it exchanges gradients with the other ranks.

Ranks that share rows or layers (tensor, context, expert and pipeline axes) wait for one another inside their passes;
such a group has one time. Between data-parallel ranks the times differ where one of them is slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class PassClock:
    """Measures the passes of each step; nothing waits for the device because of it.

    Args:
        config: megatron-core's configuration of the network, whose call at the end of the passes is watched.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began: Any = None
        self._ended: Any = None
        finalize: Callable[..., None] = config.finalize_model_grads_func

        def noted(*arguments: Any, **options: Any) -> None:
            self._ended = self._now()
            finalize(*arguments, **options)

        config.finalize_model_grads_func = noted

    def timed(self, run_passes: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a step's passes; their beginning is noted here, their end by megatron-core's call."""
        self._began, self._ended = self._now(), None
        return run_passes()

    def seconds(self) -> float:
        """Return the seconds of the passes, once the device has completed them; 0 where no gradients were made."""
        if self._began is None or self._ended is None:
            return 0.0
        if self._is_cuda:
            return float(self._began.elapsed_time(self._ended)) * 1e-3
        return float(self._ended - self._began)

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
