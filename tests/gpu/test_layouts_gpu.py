"""Kernels of Transformer Engine that layouts use on CUDA devices: its ring for context parallelism, grouped experts."""

from __future__ import annotations

import pytest
import torch

from support import gpu_worker as worker
from support.gloo import run_gloo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multiprocess,
    pytest.mark.skipif(not worker.HAS_TE, reason=worker.NO_TE),
]
RELATIVE = {"loss": 1e-3, "grad_norm": 1e-2}  # of bf16, as in test_engine_gpu.py


def check(ranks: list[dict[str, list[float]]], plain: str, other: str) -> None:
    for rank in ranks:
        assert rank[other][0] == pytest.approx(rank[plain][0], rel=RELATIVE["loss"])
        assert rank[other][1] == pytest.approx(rank[plain][1], rel=RELATIVE["grad_norm"])


@pytest.mark.promise("the ring of Transformer Engine has the loss of gathered keys and values (two GPUs)")
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="fewer than two CUDA devices; the ring of Transformer Engine was NOT tested"
)
def test_ring_has_the_loss_of_gathering() -> None:
    choices = {name: {"layers": "te", "attention": name} for name in ("sdpa", "te")}
    layout = {"context_parallel_size": 2}
    ranks = run_gloo(
        2, worker.__file__, "run_choices", on_devices=True, layout=layout, choices=choices, has_experts=False
    )
    check(ranks, "sdpa", "te")


@pytest.mark.promise("grouped experts have the loss of those one after another (GPU)")
def test_grouped_experts_have_the_loss_of_those_one_after_another(cuda: torch.device) -> None:
    del cuda  # skips without a device
    choices = {name: {"layers": "local", "device": {"experts": name}} for name in ("sequential", "grouped")}
    ranks = run_gloo(1, worker.__file__, "run_choices", on_devices=True, layout={}, choices=choices, has_experts=True)
    check(ranks, "sequential", "grouped")
