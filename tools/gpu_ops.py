"""Parts of a step by themselves, each beside what it could be: products, attention, head, embedding, host copies.

Every case is one forward and backward pass on random numbers, timed on the device; cases of a table take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_support import Report, alternate, ratio, spread
from gpu_arms import BASELINE, Machine, Shape
from gpu_steps import trainer_of
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamask.models.spec import ModelSpec
from megamask.objectives.base import scored_rows
from megamask.objectives.terms import Scores

Run = Callable[[], object]


def on_device(run: Run, *, repeats: int) -> Callable[[], float]:
    """The case, answering the seconds of one run on the device: by its events on a GPU, by the clock on a CPU."""

    def measure() -> float:
        if not torch.cuda.is_available():
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - started) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    return measure


def measured(cases: dict[str, Run], *, blocks: int, repeats: int, found: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each case that runs here; `found` takes them, and the error of each that does not."""
    running = {}
    for name, run in cases.items():
        try:
            run()
            running[name] = on_device(run, repeats=repeats)
        except Exception as error:  # noqa: BLE001 - a kernel that this machine lacks is an answer
            found[name] = f"{type(error).__name__}: {error}"[:500]
    seconds = alternate(running, blocks=blocks) if running else {}
    found.update(seconds)
    return seconds


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _trained(forward: Callable[[], torch.Tensor], gradient: torch.Tensor, *leaves: torch.Tensor) -> Run:
    """Forward and backward pass; gradients of the pass before are forgotten, so that nothing is added to them."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(gradient)

    return run


def products(report: Report, shape: Shape, spec: ModelSpec, machine: Machine, device: torch.device, **how: Any) -> None:
    """The layers' matrix products: torch in bf16, and Transformer Engine's module in bf16 and in each FP8 recipe."""
    rows = 2 * shape.micro_batch_size * shape.sequence_length
    query = (spec.num_attention_heads + 2 * spec.num_query_groups) * spec.head_dim
    sizes = {
        "query, key, value": (spec.hidden_size, query),
        "gate and up": (spec.hidden_size, 2 * spec.ffn_hidden_size),
    }
    table = report.table(
        f"Matrix products of a layer, forward and backward, {rows:,} positions",
        ["product", "case", "ms", "TFLOP/s", "time to torch in bf16"],
        "FP8 includes quantisation. torch's float8 product is a forward product of operands that are FP8 already.",
    )
    record: dict[str, Any] = {}
    for name, (inner, outer) in sizes.items():
        x = _random(rows, inner, device=device).requires_grad_()
        gradient = _random(rows, outer, device=device)
        linear = torch.nn.Linear(inner, outer, bias=False, device=device, dtype=torch.bfloat16)
        cases: dict[str, Run] = {"torch, bf16": _trained(functools.partial(linear, x), gradient, x, linear.weight)}
        if machine.capability.architecture is not None:
            cases["torch, float8, forward only"] = _float8_product(x.detach(), linear.weight.detach())
        if machine.capability.can_run_te:
            cases |= _te_cases(inner, outer, x, gradient)
        found = record.setdefault(name, {})
        seconds = measured(cases, found=found, **how)
        for case, values in seconds.items():
            passes = 1 if case.endswith("forward only") else 3
            rates = [passes * 2 * rows * inner * outer / value / 1e12 for value in values]
            against = ratio(values, seconds["torch, bf16"])
            table.add(name, case, spread(values, scale=1e3), spread(rates), against)
    report.keep("products", record)


def _float8_product(x: torch.Tensor, weight: torch.Tensor) -> Run:
    one = torch.ones((), device=x.device)
    left, right = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _te_cases(inner: int, outer: int, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, Run]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    linear = te.Linear(inner, outer, bias=False, params_dtype=torch.bfloat16, device=x.device)
    recipes = {
        "tensorwise": recipe.Float8CurrentScaling(),
        "delayed": recipe.DelayedScaling(amax_history_len=16, amax_compute_algo="max"),
        "blockwise": recipe.Float8BlockScaling(),
    }

    def quantised(made: Any) -> Run:
        def forward() -> torch.Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=made):
                return linear(x)

        return _trained(forward, gradient, x, linear.weight)

    cases = {"Transformer Engine, bf16": _trained(lambda: linear(x), gradient, x, linear.weight)}
    return cases | {f"Transformer Engine, {name}": quantised(made) for name, made in recipes.items()}


def attention(
    report: Report, shape: Shape, spec: ModelSpec, machine: Machine, device: torch.device, **how: Any
) -> None:
    """Bidirectional attention by each of torch's kernels, with grouped queries repeated and not."""
    del machine
    length, heads, groups, width = shape.sequence_length, spec.num_attention_heads, spec.num_query_groups, spec.head_dim
    table = report.table(
        f"Attention, forward and backward: 2 rows of {length:,} positions, {heads} heads, {groups} groups of {width}",
        ["case", "ms", "TFLOP/s", "time to the first"],
    )
    q = _random(2, heads, length, width, device=device).requires_grad_()
    k, v = (_random(2, groups, length, width, device=device).requires_grad_() for _ in range(2))
    gradient = _random(2, heads, length, width, device=device)

    def case(kernel: SDPBackend | None, *, is_repeated: bool) -> Run:
        def forward() -> torch.Tensor:
            with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
                keys, values = ((t.repeat_interleave(heads // groups, 1) if is_repeated else t) for t in (k, v))
                return functional.scaled_dot_product_attention(q, keys, values, enable_gqa=not is_repeated)

        return _trained(forward, gradient, q, k, v)

    kernels: dict[str, SDPBackend | None] = {"torch's choice": None}
    if torch.cuda.is_available():
        kernels |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    cases = {
        f"{name}, keys {'repeated' if is_repeated else 'shared'}": case(kernel, is_repeated=is_repeated)
        for name, kernel in kernels.items()
        for is_repeated in ((True, False) if heads != groups else (False,))
    }
    with _not_deterministic():
        seconds = measured(cases, found=(found := {}), **how)
    first = next(iter(seconds))
    for name, values in seconds.items():
        rates = [3.5 * 4 * 2 * heads * length**2 * width / value / 1e12 for value in values]
        table.add(name, spread(values, scale=1e3), spread(rates), ratio(values, seconds[first]))
    report.keep("attention", found)


@contextlib.contextmanager
def _not_deterministic() -> Iterator[None]:
    """cuDNN's kernels are refused under deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


def head_and_embedding(
    report: Report, shape: Shape, spec: ModelSpec, machine: Machine, device: torch.device, **how: Any
) -> None:
    """The head on the scored rows of a complementary pair beside all rows; the embedding beside torch's."""
    one_layer = dataclasses.replace(spec, num_layers=1)
    with trainer_of(shape, one_layer, BASELINE, machine.world_size) as trainer:
        _head(report, shape, spec, trainer.engine, device, **how)
        _embedding(report, shape, spec, trainer.engine, device, **how)


def _weighted_sum(scores: Scores) -> torch.Tensor:
    return (torch.where(scores.is_used, scores.cross_entropy, 0.0) * scores.weight).sum()


def _head(report: Report, shape: Shape, spec: ModelSpec, engine: Any, device: torch.device, **how: Any) -> None:
    from megamask.engine.selection import ScoredRows

    length, num_rows = shape.sequence_length, 2 * shape.micro_batch_size
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, spec.vocab_size - 3, (num_rows, length), generator=generator)
    half = torch.rand(num_rows // 2, length, generator=generator) < 0.5
    masks = {"pair: half of the rows": torch.cat((half, ~half)), "all rows": torch.ones_like(targets, dtype=torch.bool)}
    hidden = _random(length, num_rows, spec.hidden_size, device=device).requires_grad_()
    network, head = engine._rank_model.network, engine._rank_model.head

    def case(is_scored: torch.Tensor, chunk_rows: int) -> Run:
        rows = scored_rows(targets.to(device), targets.to(device), is_scored.to(device))
        count = int(is_scored.sum())
        scored = ScoredRows.of(rows, capacity=count, num_scored=count, chunk_rows=chunk_rows)

        def run() -> None:
            hidden.grad = None
            loss, _ = head.loss(network, hidden, scored, _weighted_sum)
            loss.backward()

        return run

    cases = {name: case(mask, shape.head_chunk_rows) for name, mask in masks.items()}
    cases["pair, one chunk"] = case(masks["pair: half of the rows"], targets.numel())
    seconds = measured(cases, found=(found := {}), **how)
    table = report.table(
        f"The head, forward and backward: {targets.numel():,} positions, {spec.vocab_size:,} entries",
        ["rows", "ms", "time to all rows", "peak memory, MB"],
    )
    for name, values in seconds.items():
        table.add(name, spread(values, scale=1e3), ratio(values, seconds["all rows"]), _peak_mb(cases[name]))
    report.keep("head", found)


def _embedding(report: Report, shape: Shape, spec: ModelSpec, engine: Any, device: torch.device, **how: Any) -> None:
    num_rows, length = 2 * shape.micro_batch_size, shape.sequence_length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, spec.vocab_size - 3, (num_rows, length), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = spec.vocab_size - 1  # the mask token
    ids = ids.to(device)
    module = engine._rank_model.network.embedding.word_embeddings
    table_weight = module.weight.detach().clone().requires_grad_()
    gradient = _random(num_rows, length, spec.hidden_size, device=device)
    cases: dict[str, Run] = {
        "float32 sums (megamask)": _trained(lambda: module(ids), gradient),
        "torch's lookup": _trained(lambda: functional.embedding(ids, table_weight), gradient, table_weight),
        "indexing (megatron-core, deterministic)": _trained(lambda: table_weight[ids], gradient, table_weight),
    }
    seconds = measured(cases, found=(found := {}), **how)
    shown = report.table(
        f"The embedding, forward and backward: {ids.numel():,} ids, half of them the mask token",
        ["case", "ms", "time to float32 sums"],
    )
    for name, values in seconds.items():
        shown.add(name, spread(values, scale=1e3), ratio(values, seconds["float32 sums (megamask)"]))
    report.keep("embedding", found)


def _peak_mb(run: Run) -> str:
    if not torch.cuda.is_available():
        return "-"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:,.0f}"


def host_copy(
    report: Report, shape: Shape, spec: ModelSpec, machine: Machine, device: torch.device, **how: Any
) -> None:
    """Copies to the host's memory, as a checkpoint beside training makes them."""
    from megamask.engine.backend import select_backend

    del shape, spec, machine
    count = (1 << 28) if device.type == "cuda" else (1 << 20)
    source = torch.ones(count, device=device)
    plain, locked = (torch.zeros(count) for _ in range(2))
    started = time.perf_counter()
    select_backend().pin(locked)
    pin_s = time.perf_counter() - started
    cases: dict[str, Run] = {
        "memory as it is": lambda: plain.copy_(source),
        "pinned memory": lambda: locked.copy_(source, non_blocking=True),
    }
    seconds = measured(cases, found=(found := {}), **how)
    shown = report.table(
        f"Copies of {4 * count >> 20} MiB to the host",
        ["case", "GB/s", "time to memory as it is"],
        f"Pinning took {pin_s:.2f} s, once for a run's first checkpoint.",
    )
    for name, values in seconds.items():
        rates = [4 * count / value / 1e9 for value in values]
        shown.add(name, spread(rates), ratio(values, seconds["memory as it is"]))
    report.keep("host", found | {"pin_s": pin_s})


SECTIONS: dict[str, Callable[..., None]] = {
    "products": products,
    "attention": attention,
    "head": head_and_embedding,
    "host": host_copy,
}
