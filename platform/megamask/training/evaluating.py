"""The held-out likelihood bound, measured from the loop on the engine, under the run's own layout."""

from __future__ import annotations

import itertools
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
from megamask.diffusion.philox import run_key
from megamask.evaluation.clip_search import clip_search_on_engine
from megamask.evaluation.on_engine import EvaluationEngine, evaluate_on_engine
from megamask.evaluation.pair_variance import pair_variance_on_engine
from megamask.objectives.base import Objective, Rows
from megamask.objectives.phased import last_probed
from megamask.objectives.shifted import at_step
from megamask.storage.fault_points import reached
from megamask.storage.hashing import hash_of, key_of
from megamask.training.stopping import CutShort

if TYPE_CHECKING:
    from megamask.engine.engine import Engine
    from megamask.engine.mesh import Mesh

Measure = Callable[[], dict[str, Any] | None]


def open_validation(config: TrainConfig) -> Loader | None:
    """The validation split, when evaluation during training is asked for.

    Raises:
        UsageError: evaluation.every_steps is set and the corpus has no validation split.
    """
    if config.evaluation.every_steps is None:
        return None
    corpora = dict(itertools.islice(config.data.corpora.items(), 1))  # of a mixture, the first corpus
    return Loader(corpora, replace(config.data, mixture=[]), config.training.sequence_length, split="validation")


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


def validation_measure(
    config: TrainConfig,
    engine: Engine,
    objective: Objective,
    loader: Loader,
    check: Callable[[], None] = lambda: None,
    step: Callable[[], int] = lambda: 0,
) -> Measure:
    """Return a function that scores the first evaluation.rows validation rows.

    It is collective and gives the same answer on every rank; None if `check` cut it short.
    """
    evaluation = config.evaluation
    num_rows = min(evaluation.rows, loader.num_rows)
    read = [loader.read(loader.source, row) for row in range(num_rows)]
    tokens = torch.from_numpy(np.stack([row.tokens for row in read]).astype(np.int64))
    is_eligible = loader.eligible(read)
    token_bytes = torch.tensor(loader.tokenizer.token_bytes)
    num_views = objective.shape(config.training.sequence_length).num_views
    seed = config.run.seed if evaluation.seed is None else evaluation.seed

    def measure() -> dict[str, Any] | None:
        """Score the rows under the network's present weights."""
        started = time.monotonic()
        bound = at_step(objective, step()).bound
        try:
            report = evaluate_on_engine(
                InterruptibleEngine(engine=engine, check=check),
                bound,
                tokens,
                is_eligible,
                draws=evaluation.draws,
                replicates=evaluation.replicates,
                key=run_key(seed),
                batch_rows=config.training.micro_batch_size * num_views,
                num_bytes=int(token_bytes[tokens[bound.scored(tokens, is_eligible)]].sum()),
            )
            extra = _asked_for(
                InterruptibleEngine(engine=engine, check=check),
                objective,
                evaluation,
                seed,
                tokens=tokens,
                is_eligible=is_eligible,
                batch_samples=config.training.micro_batch_size,
            )
        except CutShort:
            return None
        return {
            "nelbo_nats_per_token": report.nelbo_nats_per_token,
            "standard_error": report.standard_error,
            "bits_per_byte": report.bits_per_byte,
            "num_tokens": report.num_tokens,
            "num_bytes": report.num_bytes,
            "num_samples": report.num_samples,
            **extra,
            "seconds": {"evaluation": round(time.monotonic() - started, 6)},
        }

    return measure


def _asked_for(
    engine: EvaluationEngine, objective: Objective, evaluation: EvaluationConfig, seed: int, **rows: Any
) -> dict[str, Any]:
    """Measure what only some configs ask for.

    Args:
        rows: tokens, is_eligible and batch_samples.
    """
    found: dict[str, Any] = {}
    if evaluation.pair_variance_draws is not None:
        paired = objective.at(1)  # the pair, where it ends during the run
        key = key_of(hash_of(seed, "pair variance"))
        variance = pair_variance_on_engine(engine, paired, draws=evaluation.pair_variance_draws, key=key, **rows)
        found["pair_variance"] = variance.to_json()
    if evaluation.clip_search_draws is not None and (block := last_probed(objective)) is not None:
        key = key_of(hash_of(seed, "clip search"))
        search = clip_search_on_engine(engine, block, draws=evaluation.clip_search_draws, key=key, **rows)
        found["clip_search"] = search.to_json()
    return found
