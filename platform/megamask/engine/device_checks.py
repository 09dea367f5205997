"""Checks of the device: a product with known bits, rates of products and copies, links between GPUs, collectives."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from megamask.engine.probes import device_name
from megamask.resilience.preflight.finding import Check, Finding

_SIZE, _SMALL_SIZE = 8192, 512  # of the matrices on a GPU, on a CPU
_REPEATS = 5
_FIRST_FP8 = (8, 9)  # compute capability
_COPY_BYTES, _SMALL_COPY_BYTES = 1 << 30, 1 << 26
# Far above what an idle machine needs: one that is busy with other work is slow, not unfit.
_LIMIT_S, _COLLECTIVE_LIMIT_S = 120.0, 180.0


def device_checks(*, with_collectives: bool = True) -> list[Check]:
    """The checks of this process's devices; a laptop's CPU is one device.

    Args:
        with_collectives: also all-reduce over two processes of the CPU, or over all GPUs of the node.
    """
    devices = _devices()
    checks = [
        Check(name=f"{device} known bits", run=_bound(known_bits, device), limit_s=_LIMIT_S) for device in devices
    ]
    for number_format in (torch.float32, torch.bfloat16):
        checks.append(
            Check(
                name=f"{_short(number_format)} products",
                run=_bound(product_rate, devices[0], number_format),
                limit_s=_LIMIT_S,
            )
        )
    checks.append(Check(name="fp8 products", run=_bound(fp8_product_rate, devices[0]), limit_s=_LIMIT_S))
    checks.append(Check(name="memory bandwidth", run=_bound(copy_rate, devices[0]), limit_s=_LIMIT_S))
    checks.append(Check(name="links between GPUs", run=lambda: peer_rates(devices), limit_s=_LIMIT_S))
    if with_collectives:
        checks.append(Check(name="all-reduce", run=all_reduce, limit_s=_COLLECTIVE_LIMIT_S + 5))
    return checks


def known_bits(device: torch.device) -> Finding:
    """Multiply integers whose products and sums every number format holds exactly; each bit of the result is known.

    Entry (i, j) of the product of a[i, k] = (i + k) mod 3 - 1 and b[k, j] = (k * j) mod 3 - 1 is computed in int64 on
    the host.
    """
    size = 384
    index = torch.arange(size)
    left = (index[:, None] + index[None, :]) % 3 - 1
    right = (index[:, None] * index[None, :]) % 3 - 1
    expected = left @ right
    for number_format in (torch.float32, torch.bfloat16):
        product = left.to(device, number_format) @ right.to(device, number_format)
        wrong = int((product.cpu().to(torch.int64) != expected.to(number_format).to(torch.int64)).sum())
        if wrong:
            message = f"{wrong} of {expected.numel()} entries of a {_short(number_format)} product are wrong"
            return Finding(outcome="fail", message=message, values={"wrong": wrong})
    return Finding(outcome="pass", message=f"{device_name(device)}: products are exact", values={"wrong": 0})


def product_rate(device: torch.device, number_format: torch.dtype) -> Finding:
    """Median rate of a square product of random numbers; zeros would let a GPU's clock rise."""
    size = _SIZE if device.type == "cuda" else _SMALL_SIZE
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device, number_format) for _ in range(2))
    seconds = _median_seconds(lambda: left @ right, device)
    rate = 2 * size**3 / seconds
    values = {"flops_per_s": rate, "size": size}
    return Finding(outcome="pass", message=f"{rate / 1e12:,.3g} TFLOP/s at {size} x {size}", values=values)


def fp8_product_rate(device: torch.device) -> Finding:
    """Median rate of a square product of E4M3 numbers, quantised beforehand."""
    if device.type != "cuda":
        return Finding(outcome="skip", message="a CPU has no FP8 units; precision.fp8_kernels=emulate needs none")
    if (found := torch.cuda.get_device_capability(device)) < _FIRST_FP8:
        return Finding(outcome="skip", message=f"compute capability {found[0]}.{found[1]} has no FP8 units")
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator).to(device).to(torch.float8_e4m3fn) for _ in range(2))
    one, turned = torch.ones((), device=device), right.t()  # the kernel reads its second operand by columns

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(left, turned, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    rate = 2 * _SIZE**3 / _median_seconds(multiply, device)
    values = {"flops_per_s": rate, "size": _SIZE}
    return Finding(outcome="pass", message=f"{rate / 1e12:,.3g} TFLOP/s at {_SIZE} x {_SIZE}", values=values)


def copy_rate(device: torch.device) -> Finding:
    """Median rate of a copy inside the device's memory, reading and writing counted."""
    count = (_COPY_BYTES if device.type == "cuda" else _SMALL_COPY_BYTES) // 4
    source, target = (torch.ones(count, device=device) for _ in range(2))
    rate = 2 * 4 * count / _median_seconds(lambda: target.copy_(source), device)
    return Finding(outcome="pass", message=f"{rate / 1e9:,.0f} GB/s", values={"bytes_per_s": rate})


def peer_rates(devices: list[torch.device]) -> Finding:
    """Slowest copy from one GPU of the node to another."""
    if len(devices) < 2:
        return Finding(outcome="skip", message="fewer than two GPUs are visible")
    source = torch.ones(_SMALL_COPY_BYTES // 4, device=devices[0])
    rates = {}
    for device in devices[1:]:
        target = torch.empty_like(source, device=device)
        seconds = _median_seconds(_copier(target, source), device)
        rates[str(device)] = _SMALL_COPY_BYTES / seconds
    slowest = min(rates, key=rates.__getitem__)
    message = f"slowest: {devices[0]} to {slowest}, {rates[slowest] / 1e9:,.0f} GB/s"
    return Finding(outcome="pass", message=message, values=dict(rates))


def all_reduce() -> Finding:
    """Sum over all GPUs of the node, or over two processes of the CPU, and compare every element with the sum."""
    devices = _devices()
    ranks = len(devices) if devices[0].type == "cuda" else 2
    if ranks == 1:
        return Finding(outcome="skip", message="one GPU is visible; a sum needs two")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "megamask.engine.collective_probe", str(ranks)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_COLLECTIVE_LIMIT_S,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding(outcome="fail", message=f"{ranks} ranks could not sum: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rate, size = found["bytes_per_s"] / 1e9, found["bytes"] >> 20
    message = f"{found['backend']}, {ranks} ranks, {size} MiB each: {rate:,.2f} GB/s of a rank"
    return Finding(outcome="pass", message=message, values=found)


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    return statistics.median(_timed(work, device))


def _timed(work: Callable[[], object], device: torch.device) -> Iterator[float]:
    for repeat in range(_REPEATS + 2):
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        if repeat >= 2:  # the first ones load kernels and raise clocks
            yield time.perf_counter() - started


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copier(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)


def _bound(check: Callable[..., Finding], *arguments: object) -> Callable[[], Finding]:
    return lambda: check(*arguments)


def _short(number_format: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[number_format]
