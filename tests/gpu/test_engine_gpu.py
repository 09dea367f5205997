"""The engine on a CUDA device: against the reference network, against itself, with every kind of layers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support import engine_cases as cases
from support.gpu_worker import HAS_TE, NO_TE, RUNS, SPEC, WITH_TE

pytestmark = pytest.mark.gpu
needs_te = pytest.mark.skipif(not HAS_TE, reason=NO_TE)

# of the loss, relative: bf16 has a unit roundoff of 2e-3, and the loss is a mean over 250 tokens
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3}
FP8 = ("tensorwise", "delayed", "blockwise")
EVERY_RUN = [*RUNS, *(pytest.param(name, marks=needs_te) for name in WITH_TE)]


def run_of(work: Any, name: str) -> dict[str, Any]:
    run = work("runs_of_te" if HAS_TE else "runs")[name]
    assert "error" not in run, run["error"]
    return run


def terms(run: dict[str, Any]) -> dict[str, float]:
    return run["reports"][0]["loss_terms"]


@pytest.mark.parametrize("compute", TOLERANCES)
def test_steps_equal_the_reference_network(work: Any, compute: str, device: torch.device) -> None:
    run = run_of(work, compute)
    name, adam = run["backend"]
    assert name == device.type and adam.endswith("Adam")
    assert run["formats"] == ["torch.bfloat16" if compute == "bf16" else "torch.float32"]
    model = cases.reference(SPEC)
    for term, measure in (("nelbo", cases.reference_loss), ("z_loss", cases.reference_z_loss)):
        expected = (0.1 if term == "z_loss" else 1.0) * float(measure(model, 1, cases.objective(spec=SPEC)).detach())
        assert terms(run)[term] == pytest.approx(expected, rel=TOLERANCES[compute])
    assert all(math.isfinite(score) and score >= 0 for score in run["scores"])


@pytest.mark.promise("a run on a GPU repeats and resumes bit for bit, FP8 with delayed scaling included (GPU)")
@pytest.mark.parametrize("name", EVERY_RUN)
def test_resumed_steps_are_those_of_the_run_that_went_on(work: Any, name: str) -> None:
    run = run_of(work, name)
    assert run["resumed_from"] and run["resumed_late_from"]  # written at once, and while training went on
    assert run["resumed"] == run["reports"][2] == run["resumed_late"]


@pytest.mark.parametrize("name", EVERY_RUN)
def test_a_second_run_with_evaluations_between_repeats_every_bit(work: Any, name: str) -> None:
    run = run_of(work, name)
    assert run["repeated"] == run["reports"]
    assert run["repeated_digest"] == run["digest"]


def test_memory_that_is_not_filled_is_never_read(work: Any) -> None:
    """torch can fill new tensors with NaN: with it the bits are those without."""
    plain, filled = run_of(work, "bf16"), run_of(work, "filled")
    assert filled["reports"] == plain["reports"] and filled["digest"] == plain["digest"]


@needs_te
@pytest.mark.parametrize(("name", "local"), [("te_fp32", "fp32"), ("te_bf16", "bf16"), ("te_attention", "bf16")])
def test_layers_of_transformer_engine_equal_the_local_ones(work: Any, name: str, local: str) -> None:
    theirs, ours = run_of(work, name), run_of(work, local)
    assert theirs["arithmetic"]["layers"] == "te" and ours["arithmetic"]["layers"] == "local"
    tolerance = TOLERANCES[local]
    assert theirs["reports"][0]["loss"] == pytest.approx(ours["reports"][0]["loss"], rel=tolerance)
    assert theirs["reports"][0]["grad_norm"] == pytest.approx(ours["reports"][0]["grad_norm"], rel=10 * tolerance)


@needs_te
@pytest.mark.promise("device.cuda_graphs changes no bit of training (GPU)")
def test_graphs_change_no_bit(work: Any) -> None:
    graphed, plain = run_of(work, "te_graphs"), run_of(work, "te_bf16")
    assert graphed["num_graphs"] == SPEC.num_layers and plain["num_graphs"] == 0
    assert graphed["reports"] == plain["reports"] and graphed["digest"] == plain["digest"]
    assert graphed["scores"] == plain["scores"]


@needs_te
@pytest.mark.parametrize("recipe", FP8)
def test_fp8_really_ran(work: Any, recipe: str) -> None:
    """The loss is near that of bf16, and not equal to it."""
    theirs, exact = (run_of(work, name)["reports"][0]["loss"] for name in (recipe, "te_bf16"))
    assert theirs != exact
    assert theirs == pytest.approx(exact, rel=0.05)


@needs_te
def test_attention_of_transformer_engine_is_a_fused_kernel(work: Any, cuda: torch.device) -> None:
    """The library falls back to a kernel that stores all scores without a word, but for its log."""
    run_of(work, "te_attention")
    chosen = [line for line in work("runs_of_te")["log"].splitlines() if "Selected backend" in line]
    assert chosen and not any("Unfused" in line for line in chosen), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_grouped_queries_needs_no_memory_for_all_scores(dtype: torch.dtype, cuda: torch.device) -> None:
    """Forward and backward of 8,192 positions stay far below what the scores of 16 heads alone would take."""
    query, before = _attend(cuda, dtype, length=8192)
    assert torch.cuda.max_memory_allocated() - before < 16 * 8192 * 8192 * query.element_size() / 4


def test_attention_in_bf16_is_a_flash_kernel(cuda: torch.device) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        _attend(cuda, torch.bfloat16, length=1024)
        torch.cuda.synchronize()
    kernels = [event.key.lower() for event in profiler.key_averages()]
    assert any("flash" in kernel or "cudnn" in kernel for kernel in kernels), kernels
    assert not any("softmax" in kernel and "flash" not in kernel for kernel in kernels), kernels


def _attend(device: torch.device, dtype: torch.dtype, *, length: int) -> tuple[torch.Tensor, int]:
    from megamask.engine.layers.attention import RotaryAttention, RowContext
    from megamask.models.context import Context

    attention = RotaryAttention(SimpleNamespace(kv_channels=64), 1, None, "self", rope_theta=1e4, rotary_channels=64)
    query = torch.randn(length, 1, 16, 64, device=device, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(length, 1, 4, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(query, key, value, packed_seq_params=RowContext(Context())).float().square().sum().backward()
    return query, before


@pytest.mark.promise("a refused pin leaves no CUDA error behind (GPU)")
def test_gpu_computes_on_after_memory_that_cannot_be_pinned(cuda: torch.device) -> None:
    from megamask.engine.backend import select_backend

    backend = select_backend()
    memory = torch.empty(1 << 20)
    backend.pin(memory)
    backend.pin(memory)  # CUDA refuses the second time and keeps the code for the next reader
    assert float(torch.ones(3, device=backend.device).add(1).sum()) == 6
    assert torch.equal(memory.fill_(2).to(backend.device).cpu(), memory)
