#!/usr/bin/env python3
"""Training's speed: the engine beside a plain PyTorch loop, and what its parts cost.

Sections (`--only`, several with commas; all by default):

    plain   a step of the engine beside a plain loop at equal shape: the reference network, torch's AdamW, the same
            batches and masks, the same masked-row loss
    views   the complementary pair beside two independent views and one view, by time for each scored token
    run     whole runs of `megamask train`: how long a step waits for data, for its journal line, for a checkpoint

Everything is measured in turns on one process; ratios are of measurements that followed one another.
"""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from bench_support import Report, add_clock, alternate, benchmark_parser, one_process, ratio, spread, timed
from torch.nn import functional
from training_runs import measure_runs

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.training import TrainingConfig
from megamask.diffusion.corruption import corrupt
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.engine.selection import select_rows
from megamask.models.reference import ReferenceModel
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.masked import MaskedObjective

SEED = 1
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
SECTIONS = ("plain", "views", "run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Subject of a case: sizes of the network and of a step."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int
    vocab_size: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int

    def spec(self) -> ModelSpec:
        """A network with q/k norms, untied, in Llama's shape."""
        return ModelSpec(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=3 * self.hidden_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_groups,
            head_dim=self.hidden_size // self.num_heads,
            qk_norm=True,
            qkv_bias=False,
            tie_embeddings=False,
            rope_theta=10000.0,
            norm_eps=1e-5,
            init_std=0.02,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.vocab_size + -self.vocab_size % 128,
            max_sequence_length=self.sequence_length,
        )

    def vocabulary(self) -> Vocabulary:
        """The last three ids are special."""
        size = self.vocab_size
        return Vocabulary(
            vocab_size=size,
            padded_vocab_size=self.spec().padded_vocab_size,
            mask_token_id=size - 1,
            pad_token_id=size - 2,
            eod_token_id=size - 3,
        )

    def batch(self, first: int, size: int) -> Any:
        """Full rows of random tokens, as the loader would give them."""
        generator = torch.Generator().manual_seed(first)
        return SimpleNamespace(
            tokens=torch.randint(0, self.vocab_size - 3, (size, self.sequence_length), generator=generator),
            is_eligible=torch.ones(size, self.sequence_length, dtype=torch.bool),
            sample_index=torch.arange(first, first + size),
            batch_position=torch.arange(size),
            content_sum=0,
        )


SHAPES = {
    "tiny": Shape(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_groups=2,
        vocab_size=500,
        sequence_length=64,
        batch_size=4,
        micro_batch_size=2,
    ),
    "small": Shape(
        num_layers=6,
        hidden_size=320,
        num_heads=5,
        num_groups=5,
        vocab_size=4093,
        sequence_length=256,
        batch_size=4,
        micro_batch_size=4,
    ),
    "wide": Shape(
        num_layers=4,
        hidden_size=768,
        num_heads=12,
        num_groups=12,
        vocab_size=8189,
        sequence_length=512,
        batch_size=2,
        micro_batch_size=2,
    ),
}


class EngineCase:
    """Takes one step of the engine each time it is called."""

    def __init__(
        self, shape: Shape, *, compute: str, complementary: bool = True, batch_size: int | None = None
    ) -> None:
        from megamask.engine.engine import Engine

        self._shape = shape
        self._size = batch_size or shape.batch_size
        self._step = 0
        self.engine = Engine(
            shape.spec(),
            objective(shape.vocabulary(), complementary=complementary),
            OPTIMIZER,
            LayoutConfig(),
            TrainingConfig(
                steps=10**6,
                global_batch_size=self._size,
                micro_batch_size=shape.micro_batch_size * self._size // shape.batch_size,
                sequence_length=shape.sequence_length,
            ),
            SEED,
            precision=PrecisionConfig(compute=compute),
        )

    def __call__(self) -> None:
        """One step."""
        self._step += 1
        batch = self._shape.batch(self._step * self._size, self._size)
        self.loss = self.engine.step(batch, step=self._step, learning_rate=1e-3).loss


class PlainCase:
    """The same step as one would write it for one device: no layout, no shards, no buffers, no exact counts."""

    def __init__(self, shape: Shape, *, compute: str) -> None:
        self._shape, self._step = shape, 0
        self._model = ReferenceModel(shape.spec())
        self._model.initialize(SEED)
        self._objective = objective(shape.vocabulary(), complementary=True)
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=compute == "bf16")
        matrices = [weight for weight in self._model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self._model.parameters() if weight.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            foreach=True,
        )

    def __call__(self) -> None:
        """One step."""
        self._step += 1
        shape, spec, key = self._shape, self._shape.spec(), run_key(SEED)
        batch = shape.batch(self._step * shape.batch_size, shape.batch_size)
        rows = corrupt(
            batch.tokens,
            batch.is_eligible,
            batch.sample_index,
            stratified_times(self._step, shape.batch_size, key),
            schedule=noise_schedule("linear"),
            complementary=True,
            mask_token_id=shape.vocabulary().mask_token_id,
            key=key,
        )
        num_terms = int(batch.is_eligible.sum()) * 2
        self._optimizer.zero_grad()
        total = 0.0
        for first in range(0, 2 * shape.batch_size, 2 * shape.micro_batch_size):
            part = slice(first, first + 2 * shape.micro_batch_size)
            indices, is_used = select_rows(rows.is_masked[part], shape.micro_batch_size * spec.max_sequence_length)
            with self._autocast:
                hidden = self._model(rows.x_t[part]).flatten(0, 1)[indices]
                logits = self._model.logits(hidden, excluded_ids=self._objective.excluded_ids)
            entropy = functional.cross_entropy(logits.float(), rows.x_0[part].flatten()[indices], reduction="none")
            weight = rows.weight[part][indices // spec.max_sequence_length]
            loss = (torch.where(is_used, entropy, 0.0) * weight).sum() / num_terms
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_grad_norm)
        self._optimizer.step()
        self.loss = total


def objective(vocabulary: Vocabulary, *, complementary: bool) -> MaskedObjective:
    """Of every case."""
    return MaskedObjective(
        vocabulary=vocabulary, noise_schedule="linear", complementary=complementary, mask_logit="excluded"
    )


def compare_with_plain(report: Report, shape: Shape, arguments: argparse.Namespace) -> None:
    """Section `plain`."""
    table = report.table(
        "A step of the engine beside a plain loop",
        ["numbers", "engine, s", "plain, s", "speed to plain", "difference of the last loss"],
        "Speed to plain: the plain loop's time over the engine's; above 1 the engine is faster.",
    )
    for compute in arguments.compute.split(","):
        engine, plain = EngineCase(shape, compute=compute), PlainCase(shape, compute=compute)
        cases = {"engine": timed(engine, arguments.clock), "plain": timed(plain, arguments.clock)}
        seconds = alternate(cases, blocks=arguments.blocks, warmup=2)
        difference = abs(engine.loss / plain.loss - 1)
        name = "float32" if compute == "fp32" else "bf16 (plain: autocast)"
        speed = ratio(seconds["plain"], seconds["engine"])
        table.add(name, spread(seconds["engine"]), spread(seconds["plain"]), speed, difference)
        report.keep(f"plain_{compute}", seconds)
        engine.engine.close()


def compare_views(report: Report, shape: Shape, arguments: argparse.Namespace) -> None:
    """Section `views`."""
    table = report.table(
        "Views of a sample",
        ["case", "step, s", "scored tokens a step", "us a scored token", "time a scored token to the pair's"],
        "Two independent views are timed as twice as many samples with one view each: the same rows of the network, "
        "but as many rows of the head as positions, because nothing bounds the masks of two independent views.",
    )
    cases = {
        "complementary pair": EngineCase(shape, compute="fp32"),
        "two independent views": EngineCase(
            shape, compute="fp32", complementary=False, batch_size=2 * shape.batch_size
        ),
        "one view": EngineCase(shape, compute="fp32", complementary=False),
    }

    seconds = alternate({name: timed(case, arguments.clock) for name, case in cases.items()}, blocks=arguments.blocks)
    length = shape.sequence_length
    # expectations: a single view masks half of its tokens, which is what many steps give; one step's count is noise
    scored = {"complementary pair": 1.0, "two independent views": 1.0, "one view": 0.5}
    for name in cases:
        tokens = scored[name] * shape.batch_size * length
        pair = [value / length / shape.batch_size for value in seconds["complementary pair"]]
        each = [value / tokens for value in seconds[name]]
        table.add(name, spread(seconds[name]), int(tokens), spread(each, scale=1e6), ratio(each, pair))
    report.keep("views", seconds)
    for case in cases.values():
        case.engine.close()


def main() -> int:
    """Runs the chosen sections."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="sizes (default small)")
    parser.add_argument("--compute", default="fp32,bf16", help="number formats of `plain` (default fp32,bf16)")
    add_clock(parser, default="wall")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(SECTIONS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; allowed: {', '.join(SECTIONS)}")
    if arguments.quick:
        arguments.shape, arguments.blocks = "tiny", 2

    shape, report = SHAPES[arguments.shape], Report("bench_train", "Training's speed", arguments)
    report.keep("shape", dataclasses.asdict(shape))
    sections = {"plain": compare_with_plain, "views": compare_views}
    with one_process():
        for name in arguments.only.split(","):
            if name in sections:
                sections[name](report, shape, arguments)
    if "run" in arguments.only.split(","):
        measure_runs(report, blocks=max(1, arguments.blocks // 3), is_quick=arguments.quick)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
