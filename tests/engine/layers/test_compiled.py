"""Compiled kernels have the values of the formulas, at lengths of real runs, and are one kernel each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import megamask.diffusion.philox as philox_module
from megamask.diffusion.philox import philox4x32
from megamask.engine.layers import compiled
from megamask.engine.layers.operators import rotary_angles, rotate, swiglu
from support import engine_cases as cases
from support.order_oracle import philox4x32_10

FORMATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LENGTH = 2048
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with g++")


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's tracing, with the formula's own operations in place of machine code."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    compiled._compiled.cache_clear()
    yield
    compiled._compiled.cache_clear()


def draws(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Float32 arithmetic, then one rounding to the format: half a unit of bf16 is 2^-9 of the value."""
    assert found.dtype == dtype
    bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert ((found.double() - exact).abs() <= bound * exact.abs() + 1e-5).all()


@pytest.mark.promise("compiled kernels of rotation, SwiGLU and noise give the values of the formulas")
@FORMATS
def test_swiglu_and_its_gradient_are_the_formulas(dtype: torch.dtype) -> None:
    x, weight = draws(LENGTH, 1, 192, scale=4.0).to(dtype).requires_grad_(), draws(LENGTH, 1, 96, seed=1).to(dtype)
    wide = x.detach().double().requires_grad_()
    value = swiglu(x, is_compiled=True)
    gate, up = wide.chunk(2, -1)
    expected = F.silu(gate) * up
    value.backward(weight)
    expected.backward(weight.double())
    assert_rounded_once(value, expected, dtype)
    assert_rounded_once(x.grad, wide.grad, dtype)


def exact_rotation(x: torch.Tensor, positions: torch.Tensor, channels: int, theta: float) -> torch.Tensor:
    """Multiplication by a unit complex number, in float64. Shapes: x [s, b, h, d] -> [b, h, s, d]; positions [b, s]."""
    x = x.permute(1, 2, 0, 3)
    exponents = torch.arange(0, channels, 2) / channels  # float32, as the engine's angles are
    angle = (positions.float()[:, None, :, None] / theta**exponents).double()
    pairs = torch.complex(x[..., : channels // 2], x[..., channels // 2 : channels])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag, x[..., channels:]), dim=-1)


@pytest.mark.promise("compiled kernels of rotation, SwiGLU and noise give the values of the formulas")
@FORMATS
@pytest.mark.parametrize("channels", [32, 16], ids=["all channels", "half of the channels"])
@pytest.mark.parametrize("has_positions", [False, True])
def test_rotation_and_its_gradient_are_the_formulas(dtype: torch.dtype, channels: int, has_positions: bool) -> None:
    fused = draws(LENGTH, 2, 3, 48).to(dtype).requires_grad_()  # queries are a view of the projection's output
    weight = draws(2, 3, LENGTH, 32, seed=1).to(dtype)
    positions = torch.stack((torch.arange(LENGTH), torch.arange(LENGTH) % 700))
    angles = rotary_angles(
        positions if has_positions else None,
        LENGTH,
        channels=channels,
        theta=1e4,
        device=fused.device,
        dtype=torch.float32,
    )
    wide = fused.detach().double().requires_grad_()
    value = rotate(fused[..., 8:40], angles, is_compiled=True)
    in_order = torch.arange(LENGTH).expand(2, LENGTH)
    expected = exact_rotation(wide[..., 8:40], positions if has_positions else in_order, channels, 1e4)
    value.backward(weight)
    expected.backward(weight.double())
    assert value.is_contiguous()
    assert_rounded_once(value, expected, dtype)
    assert_rounded_once(fused.grad, wide.grad, dtype)


@pytest.mark.promise("compiled kernels of rotation, SwiGLU and noise give the values of the formulas")
def test_noise_has_the_bits_of_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.randint(0, 2**32, (5, 300), generator=torch.Generator().manual_seed(3)) + 2**40
    keys = torch.randint(0, 2**32, (300,), generator=torch.Generator().manual_seed(4))
    wanted = philox4x32((counter, 7, counter[:1], 2**32 + 9), (keys, 2**32 - 1))
    monkeypatch.setattr(philox_module, "rounds_by_device", {})
    compiled.compile_noise(torch.device("cpu"))
    found = philox4x32((counter, 7, counter[:1], 2**32 + 9), (keys, 2**32 - 1))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.int64
    row = tuple(int(word[4, 299]) for word in found)
    assert row == philox4x32_10(
        (int(counter[4, 299]) % 2**32, 7, int(counter[0, 299]) % 2**32, 9), (int(keys[299]), 2**32 - 1)
    )


ONE_KERNEL = """
import importlib.util, sys, torch
from torch._inductor import metrics
from megamask.diffusion import philox
spec = importlib.util.spec_from_file_location("compiled", sys.argv[1])
compiled = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiled)  # without the engine, which answers torch's questions about CUDA on a CPU
compiled.compile_noise(torch.device("cpu"))
x, angles = torch.randn(64, 2, 4, 32), torch.randn(64, 16)
for call in (
    lambda: compiled.swiglu(x),
    lambda: compiled.swiglu_gradient(x, x[..., :16].contiguous()),
    lambda: compiled.turn(x.permute(1, 2, 0, 3), angles, angles, sign=1),
    lambda: philox.philox4x32((torch.arange(64), 1, 2, 3), (4, 5)),
):
    metrics.reset()
    call()
    print(metrics.generated_kernel_count)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
def test_each_direction_is_one_kernel() -> None:
    command = [sys.executable, "-c", ONE_KERNEL, str(compiled.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * 4


@pytest.mark.multiprocess
@pytest.mark.promise("compiled kernels and shared keys train as the plain ones do")
@pytest.mark.parametrize("spec", [cases.PLAIN, cases.OPTIONS], ids=["plain", "options"])
def test_steps_are_those_of_the_plain_kernels(build, spec) -> None:
    reports = []
    for device in ({}, {"kernels": "compiled", "grouped_queries": "shared"}):
        engine = build(spec, micro_batch_size=4, device=device)
        reports.append([cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)])
    for plain, fast in zip(*reports, strict=True):
        assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert reports[0] != reports[1], "the other kernels were not used"
