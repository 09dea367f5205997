"""Forward-only scoring under the run's layout: what evaluation during training asks of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.diffusion.objective import select_rows
from megamask.engine.step import Stage


@torch.no_grad()
def masked_cross_entropy(
    stage: Stage, x_t: torch.Tensor, x_0: torch.Tensor, is_masked: torch.Tensor, *, rows_per_pass: int
) -> torch.Tensor:
    """Sum of the cross entropy over each row's masked positions; leaves weights, gradients and Adam's state alone.

    All ranks of a data-parallel coordinate call this with the same rows; coordinates may have different ones.

    Shapes: x_t, x_0 int64 [r, s]; is_masked bool [r, s]; returns float64 [r] on the CPU, in nats, the same on all
    those ranks.
    """
    num_rows, sequence_length = x_0.shape
    if num_rows == 0:
        return torch.zeros(0, dtype=torch.float64)
    padding = -num_rows % rows_per_pass  # every pass has the same shape; rows that fill it up mask nothing
    x_t, x_0, is_masked = (_fill_up(tensor.to(stage.backend.device), padding) for tensor in (x_t, x_0, is_masked))
    sums: list[torch.Tensor] = []

    def forward_step(passes: Iterator[slice], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        rows = next(passes)
        output = stage.network.encode(x_t[rows])
        if not stage.topology.is_last_stage:
            return output, lambda output: None
        indices, is_used = select_rows(is_masked[rows], rows_per_pass * sequence_length)
        cross_entropy, _ = stage.head.score(stage.network, output, x_0[rows], indices)

        def keep_sums(cross_entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            flat = torch.zeros(rows_per_pass * sequence_length, dtype=torch.float64, device=cross_entropy.device)
            flat[indices] = torch.where(is_used, cross_entropy, 0.0).double()
            sums.append(flat.reshape(rows_per_pass, sequence_length).sum(dim=1))
            return cross_entropy.sum(), torch.tensor(1, dtype=torch.int, device=cross_entropy.device), {}

        return cross_entropy, keep_sums

    num_passes = (num_rows + padding) // rows_per_pass
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([slice(n * rows_per_pass, (n + 1) * rows_per_pass) for n in range(num_passes)]),
        model=[stage.model],
        num_microbatches=num_passes,
        seq_length=sequence_length,
        micro_batch_size=rows_per_pass,
        forward_only=True,
    )
    if stage.topology.is_last_stage:
        result = torch.cat(sums)
    else:
        result = torch.zeros(num_rows + padding, dtype=torch.float64, device=stage.backend.device)
    if stage.topology.pipeline_parallel_size > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(result, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return result[:num_rows].cpu()


def _fill_up(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(num_rows, tensor.size(1)))) if num_rows else tensor
