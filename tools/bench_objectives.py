#!/usr/bin/env python3
"""Cost of each objective by scored token, beside a single view of masked diffusion.

All cases train the same network on the same rows with the engine, in turns on one process. A step of a case that
doubles its input or has two views computes more positions; how many tokens it scores is counted, not assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from bench_support import Report, alternate, one_process, ratio, spread, step_arguments, timed
from bench_train import OPTIMIZER, SEED, SHAPES, Shape

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.training import TrainingConfig
from megamask.objectives.registry import build_objective

SINGLE = "masked, one view"
_BLOCK = {"name": "block", "block_size": 16, "clean_half": "block_causal"}
_JOINT = {"name": "block", "block_size": 16, "clean_half": "token_causal", "diffusion_weight": 0.3}
CASES: dict[str, dict[str, Any]] = {
    SINGLE: {"name": "masked", "noise_schedule": "linear", "complementary": False},
    "masked, complementary pair": {"name": "masked", "noise_schedule": "linear", "complementary": True},
    "masked, pair, exact counts": {
        "name": "masked",
        "noise_schedule": "linear",
        "complementary": True,
        "mask_counts": "exact",
    },
    "masked, isolated documents": {
        "name": "masked",
        "noise_schedule": "linear",
        "complementary": False,
        "isolate_documents": True,
    },
    "autoregressive": {"name": "autoregressive"},
    "block of 16": _BLOCK,
    "block of 16, pair": _BLOCK | {"complementary": True},
    "block of 16, joint loss": _JOINT,
    "uniform": {"name": "uniform", "noise_schedule": "linear"},
    "mixed by log-SNR": {"name": "mixed", "corruption": "log_snr", "noise_schedule": "linear"},
    "mixed by edits": {"name": "mixed", "corruption": "edit", "noise_schedule": "linear"},
}
SHAPES = SHAPES | {
    "language": Shape(
        num_layers=4,
        hidden_size=256,
        num_heads=4,
        num_groups=4,
        vocab_size=32000,
        sequence_length=256,
        batch_size=4,
        micro_batch_size=4,
    )
}


class Case:
    """Takes a step of the engine each time it is called, and counts the scored tokens."""

    def __init__(self, shape: Shape, settings: dict[str, Any]) -> None:
        from megamask.engine.engine import Engine

        self._shape, self._step = shape, 0
        self.scored: list[int] = []
        self.engine = Engine(
            shape.spec(),
            build_objective({"mask_logit": "excluded"} | settings, shape.vocabulary()),
            OPTIMIZER,
            LayoutConfig(),
            TrainingConfig(
                steps=10**6,
                global_batch_size=shape.batch_size,
                micro_batch_size=shape.micro_batch_size,
                sequence_length=shape.sequence_length,
                # an eighth of the micro-batch, so that a single view skips the rows it does not score; the default of
                # 1,024 rows is made for larger micro-batches
                head_chunk_rows=max(64, shape.micro_batch_size * shape.sequence_length // 8),
            ),
            SEED,
        )

    def __call__(self) -> None:
        """One step."""
        self._step += 1
        batch = self._shape.batch(self._step * self._shape.batch_size, self._shape.batch_size)
        self.scored.append(self.engine.step(batch, step=self._step, learning_rate=1e-3).scored_tokens)


def measure(report: Report, shape: Shape, arguments: argparse.Namespace) -> None:
    """Every case in turns."""
    table = report.table(
        "Objectives, by scored token",
        ["objective", "step, s", "step to one view", "scored tokens a step", "us a scored token", "to one view"],
        "To one view: time for each scored token over that of a single view; below 1 an objective is cheaper. Scored "
        "tokens are the mean over the measured steps; at a step the count of independent masks varies.",
    )
    chosen = {name: CASES[name] for name in CASES if name == SINGLE or arguments.only in (None, name)}
    cases = {name: Case(shape, settings) for name, settings in chosen.items()}
    seconds = alternate({name: timed(case, arguments.clock) for name, case in cases.items()}, blocks=arguments.blocks)
    means = {name: sum(case.scored) / len(case.scored) for name, case in cases.items()}
    of_single = [value / means[SINGLE] for value in seconds[SINGLE]]
    for name in cases:
        each = [value / means[name] for value in seconds[name]]
        table.add(
            name,
            spread(seconds[name]),
            ratio(seconds[name], seconds[SINGLE]),
            round(means[name]),
            spread(each, scale=1e6),
            ratio(each, of_single),
        )
    report.keep("seconds", seconds)
    report.keep("scored_tokens", means)
    for case in cases.values():
        case.engine.close()


def main() -> int:
    """Measure all objectives."""
    parser, parse = step_arguments(__doc__, SHAPES, blocks=5, shape="language")
    parser.add_argument("--only", choices=sorted(CASES), help="this objective and the single view")
    arguments = parse()
    shape, report = SHAPES[arguments.shape], Report("bench_objectives", "What objectives cost", arguments)
    report.keep("shape", dataclasses.asdict(shape))
    with one_process():
        measure(report, shape, arguments)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
