#!/usr/bin/env python3
"""Cost of layouts and options: full training steps beside the same steps without them, with memory.

Each case is a training step of one small network. Every measurement is made in fresh ranks, forked from this process,
which take two steps that do not count and then some that do; the cases take turns. Seconds are those that the CPUs of
all ranks spent, communication included, so that neither other programs nor ranks that wait count. Memory is what the
fullest rank needs at its peak beyond what it held before its engine was built.

A ratio compares one case with the one named beside it, of the same block.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_support import Report, benchmark_parser, ratio, spread
from rank_pool import RankPool

from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.training import TrainingConfig
from megamask.data.loader import Batch
from megamask.engine.engine import Engine
from megamask.models.experts import ExpertSpec
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.masked import MaskedObjective

WARM_UP, COUNTED = 2, 3
_SPECIAL = ("mask_token_id", "pad_token_id", "eod_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of step.

    Args:
        beside: the case that it is compared with.
        layout: sizes of axes.
        is_pair: two complementary views, or one.
        chunk: rows of the head at a time; None computes all rows of a micro-batch at once, scored or not.
        has_experts: eight experts, of which a token visits two whose widths add up to that of the dense part.
    """

    beside: str
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_pair: bool = True
    chunk: int | None = 64
    recompute: str = "none"
    has_experts: bool = False


ONE = "one process"
PIPELINE, DATA = {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}
TENSOR, CONTEXT = {"tensor_parallel_size": 2}, {"context_parallel_size": 2}
CASES = {
    ONE: Case(beside=ONE),
    "single view": Case(beside=ONE, is_pair=False),
    "single view, head of all rows": Case(beside="single view", is_pair=False, chunk=None),
    "recompute selective": Case(beside=ONE, recompute="selective"),
    "recompute full": Case(beside=ONE, recompute="full"),
    "experts": Case(beside=ONE, has_experts=True),
    "pipeline 2": Case(beside=ONE, layout=PIPELINE),
    "pipeline 2, 2 virtual stages": Case(beside="pipeline 2", layout=PIPELINE | {"virtual_pipeline_parallel_size": 2}),
    "data 2": Case(beside=ONE, layout=DATA),
    "tensor 2": Case(beside=ONE, layout=TENSOR),
    "tensor 2, sequence parallel": Case(beside="tensor 2", layout=TENSOR | {"sequence_parallel": True}),
    "context 2": Case(beside=ONE, layout=CONTEXT),
    "experts on 2 ranks": Case(beside="experts", layout=DATA | {"expert_parallel_size": 2}, has_experts=True),
}
QUESTIONS = {
    "Objective and head": ("single view", "single view, head of all rows"),
    "Recomputation": ("recompute selective", "recompute full"),
    "Experts": ("experts", "experts on 2 ranks"),
    "Schedule and axes": (
        "pipeline 2",
        "pipeline 2, 2 virtual stages",
        "data 2",
        "tensor 2",
        "tensor 2, sequence parallel",
        "context 2",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the network and of a step."""

    width: int = 256
    length: int = 128
    vocab_size: int = 4096
    num_layers: int = 4
    num_samples: int = 4


def make_engine(case: Case, sizes: Sizes) -> Any:
    """The engine of a case."""
    special = {name: sizes.vocab_size - 1 - place for place, name in enumerate(_SPECIAL)}
    vocabulary = Vocabulary(vocab_size=sizes.vocab_size, padded_vocab_size=sizes.vocab_size, **special)
    spec = ModelSpec(
        num_layers=sizes.num_layers,
        hidden_size=sizes.width,
        ffn_hidden_size=3 * sizes.width,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=sizes.width // 4,
        qk_norm=False,
        qkv_bias=False,
        tie_embeddings=False,
        rope_theta=10000.0,
        norm_eps=1e-5,
        init_std=0.02,
        vocab_size=sizes.vocab_size,
        padded_vocab_size=sizes.vocab_size,
        max_sequence_length=sizes.length,
        experts=ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=3 * sizes.width // 2) if case.has_experts else None,
    )
    goal = MaskedObjective(
        vocabulary=vocabulary, noise_schedule="linear", complementary=case.is_pair, mask_logit="excluded"
    )
    return Engine(
        spec,
        goal,
        OptimizerConfig(learning_rate=1e-4),
        LayoutConfig(**case.layout),
        TrainingConfig(
            steps=100,
            global_batch_size=sizes.num_samples,
            micro_batch_size=1,
            sequence_length=sizes.length,
            head_chunk_rows=sizes.length if case.chunk is None else case.chunk,
            recompute=case.recompute,
        ),
        1,
        device=DeviceConfig(layers="local"),
    )


def measure(case: Case, sizes: Sizes) -> tuple[float, float]:
    """Expenses of one rank: CPU seconds of a step, MiB at the peak."""
    before = _memory("VmRSS")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    engine = make_engine(case, sizes)
    started = 0.0
    for step in range(1, WARM_UP + COUNTED + 1):
        if step == WARM_UP + 1:
            dist.barrier()
            started = time.process_time()
        engine.step(_batch(engine, sizes, step), step=step, learning_rate=1e-4)
    seconds = (time.process_time() - started) / COUNTED
    return seconds, (_memory("VmHWM") - before) / 1024


def _batch(engine: Any, sizes: Sizes, step: int) -> Batch:
    members = engine.members(sizes.num_samples)
    indices = [(step - 1) * sizes.num_samples + place for place in members]
    rows = [
        torch.randint(0, sizes.vocab_size - 3, (sizes.length,), generator=torch.Generator().manual_seed(index))
        for index in indices
    ]
    tokens = torch.stack(rows)
    return Batch(
        tokens=tokens,
        is_eligible=torch.ones_like(tokens, dtype=torch.bool),
        sample_index=torch.tensor(indices),
        batch_position=torch.tensor(members),
        rows=[],
        content_sum=0,
    )


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def run_blocks(pool: RankPool, sizes: Sizes, blocks: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and peaks of every case, in turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"cpu_s": [], "peak_mib": []} for name in CASES}
    for block in range(blocks):
        for name in CASES if block % 2 == 0 else reversed(CASES):
            case = CASES[name]
            ranks = pool.run(LayoutConfig(**case.layout).num_processes, measure, case, sizes)
            found[name]["cpu_s"].append(sum(seconds for seconds, _ in ranks))
            found[name]["peak_mib"].append(max(peak for _, peak in ranks))
    return found


def main() -> int:
    """Measure and report."""
    arguments: argparse.Namespace = benchmark_parser(__doc__, blocks=5).parse_args()
    sizes = Sizes()
    if arguments.quick:
        arguments.blocks, sizes = 2, Sizes(width=32, length=32, vocab_size=128)
    report = Report("bench_parallel", "Layouts and options", arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = run_blocks(RankPool(Path(folder)), sizes, arguments.blocks)
    for title, names in QUESTIONS.items():
        table = report.table(
            title,
            ["case", "compared with", "CPU s of a step, all ranks", "ratio", "peak of the fullest rank, MiB", "ratio"],
        )
        for name in (ONE, *names):
            other = found[CASES[name].beside]
            mine = found[name]
            table.add(
                name,
                CASES[name].beside,
                spread(mine["cpu_s"]),
                ratio(mine["cpu_s"], other["cpu_s"]),
                spread(mine["peak_mib"]),
                ratio(mine["peak_mib"], other["peak_mib"]),
            )
    report.keep("sizes", dataclasses.asdict(sizes))
    report.keep("measured", found)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
