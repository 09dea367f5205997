"""The held-out likelihood bound, measured from the loop on the engine, under the run's own layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megamask.config.schema.evaluation import EvaluationConfig
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.data.source import has_split
from megamask.diffusion.philox import run_key
from megamask.evaluation.clip_search import clip_search_on_engine
from megamask.evaluation.on_engine import EvaluationEngine, evaluate_on_engine
from megamask.evaluation.pair_variance import pair_variance_on_engine
from megamask.objectives.base import Objective, Rows
from megamask.objectives.in_force import at_step, bound_record, newest_pair, probed
from megamask.storage.fault_points import reached
from megamask.storage.hashing import hash_of, key_of
from megamask.training.stopping import CutShort

if TYPE_CHECKING:
    from megamask.engine.engine import Engine
    from megamask.engine.mesh import Mesh

Measure = Callable[[], dict[str, Any] | None]


def open_validation(config: TrainConfig) -> Loader | None:
    """The validation splits of all corpora that have one, when evaluation during training is asked for.

    Raises:
        UsageError: evaluation.every_steps is set and the first corpus has no validation split.
    """
    if config.evaluation.every_steps is None:
        return None
    first, *others = config.data.corpora
    names = [first, *(name for name in others if has_split(name, config.data.corpora[name], config.data, "validation"))]
    mixture = [{"weights": dict.fromkeys(names, 1)}] if others else []  # rows are read by number: weights are unused
    corpora = {name: config.data.corpora[name] for name in names}
    data = replace(config.data, mixture=mixture)
    return Loader(corpora, data, config.training.sequence_length, split="validation")


@dataclass(frozen=True, kw_only=True)
class InterruptibleEngine:
    """An engine that asks before each pass whether the attempt must end. All coordinates make the same passes.

    Args:
        check: collective; raises CutShort on every rank.
    """

    engine: Engine
    check: Callable[[], None]

    @property
    def mesh(self) -> Mesh:
        """Coordinates of this rank."""
        return self.engine.mesh

    def score(self, rows: Rows) -> Tensor:
        """As `Engine.score`."""
        self.check()
        reached("evaluation.pass_begun")
        return self.engine.score(rows)

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Engine.gather_objects`."""
        return self.engine.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        """As `Engine.broadcast_object`."""
        return self.engine.broadcast_object(value)


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """Rows of one corpus: tokens int64 and is_eligible bool [rows, L]."""

    tokens: Tensor
    is_eligible: Tensor

    @classmethod
    def read(cls, loader: Loader, source: str, num_rows: int) -> _HeldOut:
        """The first rows of a source, at most `num_rows`."""
        count = min(num_rows, loader.sources[source].order.num_rows)
        read = [loader.read(source, row) for row in range(count)]
        tokens = torch.from_numpy(np.stack([row.tokens for row in read]).astype(np.int64))
        return cls(tokens=tokens, is_eligible=loader.eligible(read))


def validation_measure(
    config: TrainConfig,
    engine: Engine,
    objective: Objective,
    loader: Loader,
    check: Callable[[], None] = lambda: None,
    step: Callable[[], int] = lambda: 0,
) -> Measure:
    """Return a function that scores the first evaluation.rows validation rows of every source of the loader.

    Its answer is that of the first source; of several sources it also holds each one's, under `by_source`. It is
    collective and gives the same answer on every rank; None if `check` cut it short. The bound is that of the phase
    which the network was last trained in.
    """
    evaluation = config.evaluation
    held_out = {name: _HeldOut.read(loader, name, evaluation.rows) for name in loader.sources}
    token_bytes = torch.tensor(loader.tokenizer.token_bytes)
    seed = config.run.seed if evaluation.seed is None else evaluation.seed
    watched = InterruptibleEngine(engine=engine, check=check)

    def bound_of(rows: _HeldOut) -> dict[str, Any]:
        trained = at_step(objective, step())
        bound, num_views = trained.bound, trained.shape(config.training.sequence_length).num_views
        report = evaluate_on_engine(
            watched,
            bound,
            rows.tokens,
            rows.is_eligible,
            draws=evaluation.draws,
            replicates=evaluation.replicates,
            key=run_key(seed),
            batch_rows=config.training.micro_batch_size * num_views,
            num_bytes=int(token_bytes[rows.tokens[bound.scored(rows.tokens, rows.is_eligible)]].sum()),
        )
        names = ("nelbo_nats_per_token", "standard_error", "bits_per_byte", "num_tokens", "num_bytes", "num_samples")
        return {name: getattr(report, name) for name in names}

    def measure() -> dict[str, Any] | None:
        """Score the rows under the network's present weights."""
        started, first, taken = time.monotonic(), held_out[loader.source], step()
        try:
            found = {name: bound_of(rows) for name, rows in held_out.items()}
            rows = {"tokens": first.tokens, "is_eligible": first.is_eligible}
            extra = _asked_for(
                watched, objective, taken, evaluation, seed, batch_samples=config.training.micro_batch_size, **rows
            )
        except CutShort:
            return None
        if len(found) > 1:
            extra["by_source"] = found
        seconds = {"evaluation": round(time.monotonic() - started, 6)}
        return {**found[loader.source], **bound_record(objective, taken), **extra, "seconds": seconds}

    return measure


def _asked_for(
    engine: EvaluationEngine, objective: Objective, step: int, evaluation: EvaluationConfig, seed: int, **rows: Any
) -> dict[str, Any]:
    """Measure what only some configs ask for.

    Args:
        step: taken so far; the pair may have ended, and a phase of one block a row has no blocks to probe.
        rows: tokens, is_eligible and batch_samples.
    """
    found: dict[str, Any] = {}
    if evaluation.pair_variance_draws is not None:
        paired = newest_pair(objective, step)
        key = key_of(hash_of(seed, "pair variance"))
        variance = pair_variance_on_engine(engine, paired, draws=evaluation.pair_variance_draws, key=key, **rows)
        found["pair_variance"] = variance.to_json()
    if evaluation.clip_search_draws is not None and (block := probed(objective, step)) is not None:
        key = key_of(hash_of(seed, "clip search"))
        search = clip_search_on_engine(engine, block, draws=evaluation.clip_search_draws, key=key, **rows)
        found["clip_search"] = search.to_json()
    return found
