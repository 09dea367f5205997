"""Request of `megamask evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Text to score, and the masks to score it with.

    Args:
        texts: files, each one document; empty means a split.
        split: which split of the corpus. corpus: its folder; None means the run's own.
        score: of a split, "all" tokens or "answers" alone; None means as the run was trained (`data.score`).
        rows: rows to score, from the first on; None means all of a text and the first 64 of a split.
        draws: masks per row in one replicate. replicates: independent replicates.
        seed: of the masks; None means run.seed.
        token_ids: a .npy file, int64 [n, L], in place of texts and splits: for checkpoints without a tokenizer.
        objective: score as this objective; None means the one that the model was trained for.
        given_first: leave out the first token of each row, as an autoregressive model must.
    """

    texts: Sequence[Path] = ()
    split: str = "validation"
    corpus: Path | None = None
    score: str | None = None
    rows: int | None = None
    draws: int = 4
    replicates: int = 4
    seed: int | None = None
    token_ids: Path | None = None
    objective: str | None = None
    given_first: bool = False
