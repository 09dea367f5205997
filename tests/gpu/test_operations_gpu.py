"""Operations of the engine on a CUDA device against float64 on the host: loss, embedding, norm, rotation, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megamask.engine.cross_entropy import ShardedSoftmax
from megamask.engine.embedding import _Lookup
from megamask.engine.layers import operators

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def group(job: None) -> None:
    """A process group: the loss asks its tensor-parallel ranks."""


def test_cross_entropy_of_a_large_vocabulary_equals_float64(device: torch.device) -> None:
    num_columns, num_rows = (126_464 if device.type == "cuda" else 4_096), 256
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(num_rows, num_columns, generator=generator)).bfloat16()
    targets = torch.randint(0, num_columns, (num_rows,), generator=generator)
    excluded = torch.zeros(num_columns, dtype=torch.bool)
    excluded[7] = True
    exact = logits.double().masked_fill(excluded, float("-inf"))
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    softmax = exact.softmax(dim=1)
    softmax[torch.arange(num_rows), targets] -= 1.0
    is_scored = targets != 7
    assert dist.group.WORLD is not None
    made = ShardedSoftmax(logits.to(device), targets.to(device), excluded.to(device), 0, dist.group.WORLD)
    found = made.cross_entropy.detach().double().cpu()
    torch.testing.assert_close(found[is_scored], expected[is_scored], rtol=1e-5, atol=1e-5)
    one = torch.ones(num_rows, device=device)
    gradient = made.logit_gradient(one, torch.zeros_like(one)).double().cpu()
    torch.testing.assert_close(gradient[is_scored], softmax[is_scored], rtol=2**-7, atol=1e-6)


def test_cross_entropy_keeps_no_float32_logits_beside_one_copy(cuda: torch.device) -> None:
    num_rows, num_columns = 2048, 126_464
    logits = torch.randn(num_rows, num_columns, device=cuda, dtype=torch.bfloat16)
    targets = torch.zeros(num_rows, dtype=torch.int64, device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert dist.group.WORLD is not None
    excluded = torch.zeros(num_columns, dtype=torch.bool, device=cuda)
    made = ShardedSoftmax(logits, targets, excluded, 0, dist.group.WORLD)
    one = torch.ones(num_rows, device=cuda)
    made.logit_gradient(one, one)
    assert torch.cuda.max_memory_allocated() - before < 3.1 * 4 * num_rows * num_columns


@pytest.mark.promise("the gradient of a frequent id is summed in float32, in the same order every time")
def test_the_embeddings_gradient_is_exact_and_repeats_itself(device: torch.device) -> None:
    num_ids, width, count = 512, 64, 8192
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, num_ids, (1, count), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = 3
    gradient = torch.randn(1, count, width, generator=generator).bfloat16()
    expected = torch.zeros(num_ids, width, dtype=torch.float64)
    expected.index_add_(0, ids[0], gradient[0].double())
    found = []
    for _ in range(20):
        table = torch.zeros(num_ids, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        _Lookup.apply(table, ids.to(device), 3).backward(gradient.to(device))
        assert table.grad is not None
        found.append(table.grad.cpu())
    assert all(torch.equal(each, found[0]) for each in found)
    error = (found[0].double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 2**-8


def _norm(x: torch.Tensor) -> torch.Tensor:
    return operators.rms_norm(x, torch.linspace(0.5, 1.5, x.size(-1), device=x.device).to(x.dtype), 1e-5)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    angles = operators.rotary_angles(None, x.size(0), channels=x.size(-1), theta=1e4, device=x.device, dtype=x.dtype)
    return operators.rotate(x, angles)


@pytest.mark.parametrize("operation", [_norm, _rotated, operators.swiglu], ids=["norm", "rotation", "swiglu"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_fused_operations_equal_float64_on_the_host(
    operation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, limit: float, device: torch.device
) -> None:
    x = torch.randn(64, 2, 4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    answers = []
    for place, number_format in ((device, dtype), (torch.device("cpu"), torch.float64)):
        given = x.clone().to(place, number_format).detach().requires_grad_()
        made = operation(given)
        made.square().sum().backward()
        assert given.grad is not None
        answers.append((made.detach().double().cpu(), given.grad.double().cpu()))
    for ours, exact in zip(*answers, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < limit
