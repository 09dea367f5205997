#!/usr/bin/env python3
"""The head's time and memory: logits of all rows at once, as before, beside chunks of several sizes.

Each case is one forward and backward pass of the head alone: cross entropy of one micro-batch's scored rows, with
gradients of the hidden states and of the output layer. Memory is what the pass needs beyond what the process holds.

    pair    a complementary pair: every row of the head is scored
    single  a single view: half of the rows are scored; all at once computes the others too, as shapes are fixed
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench_support import Report, alternate, benchmark_parser, peak_memory_mib, ratio, spread

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.training import TrainingConfig
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import scored_rows
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.terms import Scores

ALL_AT_ONCE = "all at once"


def make_engine(*, hidden_size: int, vocab_size: int, sequence_length: int, compute: str) -> Any:
    """An engine of one small layer whose head has the wanted shape."""
    from megamask.engine.engine import Engine

    padded = vocab_size + -vocab_size % 128
    special = {"mask_token_id": vocab_size - 1, "pad_token_id": vocab_size - 2, "eod_token_id": vocab_size - 3}
    spec = ModelSpec(
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=64,
        num_attention_heads=1,
        num_query_groups=1,
        head_dim=16,
        qk_norm=False,
        qkv_bias=False,
        tie_embeddings=False,
        rope_theta=10000.0,
        norm_eps=1e-5,
        init_std=0.02,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        max_sequence_length=sequence_length,
    )
    goal = MaskedObjective(
        vocabulary=Vocabulary(vocab_size=vocab_size, padded_vocab_size=padded, **special),
        noise_schedule="linear",
        complementary=True,
        mask_logit="excluded",
    )
    training = TrainingConfig(steps=1, global_batch_size=1, sequence_length=sequence_length)
    return Engine(
        spec,
        goal,
        OptimizerConfig(learning_rate=1e-3),
        LayoutConfig(),
        training,
        1,
        precision=PrecisionConfig(compute=compute),
    )


class _AllAtOnce(torch.autograd.Function):
    """Cross entropy from the logits of all rows, kept to the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, head: Any) -> torch.Tensor:
        from megamask.engine.cross_entropy import ShardedSoftmax

        ctx.softmax = ShardedSoftmax(logits, targets, head.columns_without(frozenset()), 0, dist.group.WORLD)
        entropy: torch.Tensor = ctx.softmax.cross_entropy
        return entropy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.softmax.logit_gradient(gradient, torch.zeros_like(gradient)), None, None


def weighted_sum(scores: Scores) -> torch.Tensor:
    """A loss of one term."""
    return (torch.where(scores.is_used, scores.cross_entropy, 0.0) * scores.weight).sum()


def cases_of(
    engine: Any, *, hidden: torch.Tensor, num_rows: int, scored_fraction: float, sizes: list[int]
) -> dict[str, Callable[[], None]]:
    """One forward and backward pass of each kind, by name."""
    from megamask.engine.selection import ScoredRows

    head, network = engine._rank_model.head, engine._rank_model.network
    length = hidden.size(0)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 64, (2 * num_rows // length, length), generator=generator)
    is_scored = torch.zeros(targets.numel(), dtype=torch.bool)
    is_scored[torch.randperm(targets.numel(), generator=generator)[: int(num_rows * scored_fraction)]] = True
    is_scored = is_scored.view_as(targets)
    rows = scored_rows(targets, targets, is_scored)

    def chunked(size: int) -> Callable[[], None]:
        def run() -> None:
            scored = ScoredRows.of(rows, capacity=num_rows, num_scored=int(is_scored.sum()), chunk_rows=size)
            head.loss(network, hidden, scored, weighted_sum)[0].backward()

        return run

    def all_at_once() -> None:
        scored = ScoredRows.of(rows, capacity=num_rows, num_scored=num_rows, chunk_rows=num_rows)
        logits = head.logits(network, hidden, scored.indices)
        entropy = _AllAtOnce.apply(logits, scored.targets, head)  # type: ignore[no-untyped-call]
        (torch.where(scored.is_used, entropy, 0.0) * scored.weight).sum().backward()

    return {ALL_AT_ONCE: all_at_once} | {f"chunks of {size:,}": chunked(size) for size in sizes}


def timed(case: Callable[[], None]) -> Callable[[], float]:
    """The case, answering the seconds that the CPU spent on it: other programs do not count."""

    def run() -> float:
        started = time.process_time()
        case()
        return time.process_time() - started

    return run


def compare(report: Report, arguments: argparse.Namespace, compute: str) -> None:
    """One table of a number format."""
    num_rows, width, vocab_size = (256, 64, 1000) if arguments.quick else (2048, 512, 16384)
    length = num_rows // 4
    sizes = [num_rows // 16, num_rows // 8, num_rows // 4, num_rows // 2, num_rows]
    engine = make_engine(hidden_size=width, vocab_size=vocab_size, sequence_length=length, compute=compute)
    hidden = torch.randn(length, 8, width, generator=torch.Generator().manual_seed(2))
    hidden = hidden.to(torch.float32 if compute == "fp32" else torch.bfloat16).requires_grad_()
    table = report.table(
        f"The head in {compute}: {num_rows:,} rows, {width} channels, {vocab_size:,} entries",
        ["rows scored", "case", "CPU s", "time to all at once", "peak memory, MiB"],
    )
    for name, scored_fraction in (("pair", 1.0), ("single", 0.5)):
        cases = cases_of(engine, hidden=hidden, num_rows=num_rows, scored_fraction=scored_fraction, sizes=sizes)
        seconds = alternate({case: timed(run) for case, run in cases.items()}, blocks=arguments.blocks)
        for case, run in cases.items():
            against = ratio(seconds[case], seconds[ALL_AT_ONCE])
            table.add(name, case, spread(seconds[case]), against, peak_memory_mib(run))
        report.keep(f"{compute}_{name}", seconds)
    engine.close()


def main() -> int:
    """Run both number formats."""
    arguments = benchmark_parser(__doc__, blocks=5).parse_args()

    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group

    if arguments.quick:
        arguments.blocks = 2
    report = Report("bench_head", "The head", arguments)
    init_process_group(select_backend())
    for compute in ("fp32", "bf16"):
        compare(report, arguments, compute)
    destroy_process_group()
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
