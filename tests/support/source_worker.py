"""Work of each process of a test of `initialise.source`: set weights from a published model, then score rows."""

from __future__ import annotations

from typing import Any

import torch

from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.training import TrainingConfig
from megamask.conversion.source import AdaptedWeights, MaskRow, open_source
from megamask.models.context import Bidirectional, Causal, Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import scored_rows

LENGTH = 32


def tokens_of(vocab_size: int) -> torch.Tensor:
    """Rows of random ids: int64 [2, LENGTH]."""
    return torch.randint(0, vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def scores(runs: list[list[Any]]) -> list[dict[str, list[list[float]]]]:
    """Each run: a folder and a layout. Cross entropy of the rows themselves, by pattern: [positions][rows]."""
    return [_scores(folder, layout) for folder, layout in runs]


def _scores(folder: str, layout: dict[str, Any]) -> dict[str, list[list[float]]]:
    from megamask.engine.engine import Engine

    source = open_source(f"hf:{folder}")
    size = source.spec.vocab_size
    vocabulary = Vocabulary(
        vocab_size=size,
        padded_vocab_size=source.spec.padded_vocab_size,
        mask_token_id=size - 1,
        eod_token_id=0,
        pad_token_id=1,
    )
    engine = Engine(
        source.spec,
        AutoregressiveObjective(vocabulary=vocabulary, mask_logit="included"),
        OptimizerConfig(learning_rate=1e-3),
        LayoutConfig(**layout),
        TrainingConfig(steps=1, global_batch_size=2, micro_batch_size=2, sequence_length=LENGTH),
        seed=1,
        draws_weights=False,
    )
    engine.set_weights(AdaptedWeights(source=source, mask_token_id=size - 1, mask_row=MaskRow(rule="kept")).read)
    tokens = tokens_of(size)
    answer = {}
    for name, pattern in (("bidirectional", Bidirectional()), ("causal", Causal())):
        columns = []
        for position in range(0, LENGTH, 5):
            is_scored = torch.zeros_like(tokens, dtype=torch.bool)
            is_scored[:, position] = True
            columns.append(engine.score(scored_rows(tokens, tokens, is_scored, Context(pattern=pattern))).tolist())
        answer[name] = columns
    engine.close()
    return answer
