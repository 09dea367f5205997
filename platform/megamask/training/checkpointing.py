"""Committing a checkpoint from the loop: journal before, save, journal after, prune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamask.checkpoint.agreement import on_main
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.retention import prune
from megamask.checkpoint.saver import save
from megamask.training.attempt import AttemptView
from megamask.training.progress import Progress

if TYPE_CHECKING:
    from megamask.engine.engine import Engine


class CheckpointCommitter:
    """Saves the run's present state on all ranks together and prunes what is too old.

    Args:
        keep_last: committed checkpoints to keep.
        parent: digest of the commit that this attempt resumed from.
        damaged: names of folders that did not verify; they do not count as kept.
        num_steps: training.steps, recorded beside the state.
    """

    def __init__(
        self,
        engine: Engine,
        attempt: AttemptView,
        *,
        model: ModelDocument,
        tokenizer_folder: Path,
        corpora: Mapping[str, str],
        seed: int,
        num_steps: int,
        keep_last: int,
        parent: str | None,
        damaged: Sequence[str],
    ) -> None:
        self._engine = engine
        self._attempt = attempt
        self._model = model
        self._tokenizer_folder = tokenizer_folder
        self._corpora = dict(corpora)
        self._seed = seed
        self._num_steps = num_steps
        self._keep_last = keep_last
        self._parent = parent
        self._damaged = tuple(damaged)

    def __call__(self, progress: Progress) -> None:
        """Commits; returns when the checkpoint is visible. Raises what checkpoint.saver.save raises."""
        attempt = self._attempt
        attempt.append("checkpoint_started", step=progress.step)
        started = time.monotonic()
        commit = save(
            self._engine,
            attempt.run_dir,
            attempt=attempt.number,
            state=self._state(progress),
            model=self._model,
            tokenizer_folder=self._tokenizer_folder,
            corpora=self._corpora,
            journal_head=attempt.durable_journal_head(),
            run_id=attempt.run_id,
            parent=self._parent,
            check_claim=attempt.check_claim,
        )
        attempt.append(
            "checkpoint_committed",
            step=commit.step,
            checkpoint=commit.folder.name,
            digest=commit.digest,
            parent=self._parent,
            bytes=commit.num_bytes,
            stall_s=round(time.monotonic() - started, 6),
        )
        self._parent = commit.digest
        pruned = on_main(self._engine, lambda: prune(attempt.run_dir, self._keep_last, damaged=self._damaged))
        for name in pruned:
            attempt.append("checkpoint_pruned", step=progress.step, checkpoint=name)

    def _state(self, progress: Progress) -> TrainerState:
        return TrainerState(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            seed=self._seed,
            schedule={"training_steps": self._num_steps},
        )
