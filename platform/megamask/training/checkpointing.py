"""Checkpoints beside the loop: journal before, save, announce when visible, prune. At most one save is pending."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megamask.checkpoint.background import Gate, Work, all_done
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.reader import candidates, has_commit
from megamask.checkpoint.retention import is_marked_damaged, prune
from megamask.checkpoint.saver import Save, SaveRequest
from megamask.config.schema.checkpoint import CheckpointConfig
from megamask.errors import MegamaskError, SupersededError
from megamask.provenance.redaction import reason_of
from megamask.runs.laws import LAWS, SKIPPING_LAWS
from megamask.tracking.records import CheckpointPruned, CheckpointStarted, Incident
from megamask.training.announcing import commit_record
from megamask.training.attempt import FollowerAttempt
from megamask.training.progress import Progress
from megamask.training.rewinding import REWINDS_KEY

if TYPE_CHECKING:
    from megamask.engine.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Stall:
    """Seconds that the step loop has waited for one checkpoint."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Add the time of a block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started


@dataclass(frozen=True, kw_only=True)
class _PendingSave:
    """A pending save."""

    save: Save
    stall: Stall = field(default_factory=Stall)


@dataclass(frozen=True, kw_only=True)
class _Pruned:
    """Names of the folders that are gone, and what could not go: a name, where one is known, and why."""

    removed: list[str] = field(default_factory=list)
    refused: list[tuple[str | None, str]] = field(default_factory=list)


class CheckpointCommitter:
    """Saves the run's state on all ranks together and prunes what is too old.

    Every method but `abort` is called by all ranks together, from the thread that trains; only that thread makes
    collective calls and journals.

    Args:
        model, tokenizer_folder, corpora, seed: of the run, stored in every checkpoint.
        num_steps: training.steps, recorded beside the state.
        num_rewinds: of the run before this attempt; with any, the order law has version 2.
        parent: digest of the commit that this attempt resumed from.
    """

    def __init__(
        self,
        engine: Engine,
        attempt: FollowerAttempt,
        checkpoint: CheckpointConfig,
        *,
        model: ModelDocument,
        tokenizer_folder: Path,
        corpora: Mapping[str, str],
        seed: int,
        num_steps: int,
        num_rewinds: int = 0,
        parent: str | None,
    ) -> None:
        self._engine = engine
        self._attempt = attempt
        self._checkpoint = checkpoint
        self._model = model
        self._tokenizer_folder = tokenizer_folder
        self._corpora = dict(corpora)
        self._seed = seed
        self._num_steps = num_steps
        self._num_rewinds = num_rewinds
        self._parent = parent
        self._pending: _PendingSave | None = None
        self._pruning: tuple[int, Work[_Pruned]] | None = None

    def prune_before_training(self, resumed: Commit) -> None:
        """Remove what the present policy does not keep, on rank 0: on a full disk the next save needs that space.

        The checkpoint that was resumed from stays, and so do those that did not verify: until there is a newer commit
        a person may want to look at them. A refusal of the storage is an incident, not a failure.
        """
        if not self._engine.is_main:
            return
        attempt, pruned = self._attempt, _Pruned()
        before = candidates(attempt.run_dir)
        passed_over = [folder.name for folder in before if is_marked_damaged(folder)]
        try:
            pruned = self._prune(lambda: None, spared=(resumed.folder.name, *passed_over))
        except SupersededError:  # the loop looks at the claims too, and ends as it should
            _log.warning("nothing more is pruned: a newer attempt has claimed the run")
        gone = [folder.name for folder in reversed(before) if not has_commit(folder)]
        self._journal_pruned(resumed.step, _Pruned(removed=gone, refused=pruned.refused))

    def begin(self, progress: Progress, evaluation: Mapping[str, float] | None) -> None:
        """Start saving the present state, after the end of the save before; blocks if saving is not asynchronous.

        Args:
            evaluation: the bound measured at this very step, if it was.

        Raises: what checkpoint.saver.Save raises.
        """
        self._begin(progress, evaluation, in_background=self._checkpoint.asynchronous)
        if not self._checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Announce a save that has become visible; raise its failure. Called once a step."""
        if self._pending is not None:
            self._announce_if_committed(self._pending, wait=False)
        elif self._pruning is not None:
            self._journal_if_pruned(self._pruning, wait=False)

    def finish(self) -> None:
        """Wait for the pending save."""
        if self._pending is not None:
            self._announce_if_committed(self._pending, wait=True)
        if self._pruning is not None:
            self._journal_if_pruned(self._pruning, wait=True)

    def commit(self, progress: Progress, evaluation: Mapping[str, float] | None) -> None:
        """Save the present state and return when it is visible; nothing is copied. Raises as `begin`."""
        self._begin(progress, evaluation, in_background=False)
        self.finish()

    def abort(self, *, together: bool) -> None:
        """Abort the pending save: nothing of it becomes visible unless it is already.

        Args:
            together: all ranks call this.
        """
        if self._pending is not None:
            self._pending.save.cancel()
        if self._pruning is not None:
            self._pruning[1].stop()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.save.abort(together=together)

    def _begin(self, progress: Progress, evaluation: Mapping[str, float] | None, *, in_background: bool) -> None:
        self.finish()
        attempt, stall = self._attempt, Stall()
        with stall.counted():
            attempt.write(CheckpointStarted(step=progress.step))
            request = SaveRequest(
                attempt=attempt.number,
                state=self._state(progress),
                model=self._model,
                tokenizer_folder=self._tokenizer_folder,
                corpora=self._corpora,
                journal_head=attempt.durable_journal_head(),
                run_id=attempt.run_id,
                run_sha256=attempt.run_sha256,
                laws=SKIPPING_LAWS if self._num_rewinds else LAWS,
                parent=self._parent,
                check_claim=attempt.check_claim,
                evaluation=None if evaluation is None else {name: repr(value) for name, value in evaluation.items()},
            )
            save = Save(self._engine, attempt.run_dir, request, in_background=in_background)
        self._pending = _PendingSave(save=save, stall=stall)

    def _announce_if_committed(self, pending: _PendingSave, *, wait: bool) -> None:
        self._pending = None  # a failing save has cleaned up after itself
        with pending.stall.counted():
            commit = pending.save.wait() if wait else pending.save.poll()
        if commit is None:
            self._pending = pending
            return
        self._announce(commit, pending)
        self._parent = commit.digest
        is_main = self._engine.is_main
        self._pruning = (
            commit.step,
            Work(
                lambda gate: self._prune(gate) if is_main else _Pruned(),
                in_thread=self._checkpoint.asynchronous and is_main,
            ),
        )

    def _prune(self, gate: Gate, spared: Collection[str] = ()) -> _Pruned:
        pruned = _Pruned()
        try:
            self._prune_into(pruned, gate, spared)
        except SupersededError:
            raise
        except (MegamaskError, OSError) as error:  # the commit is valid; pruning is tried again after the next one
            pruned.refused.append((None, reason_of(error)))
        return pruned

    def _prune_into(self, pruned: _Pruned, gate: Gate, spared: Collection[str]) -> None:
        def may_go_on() -> None:
            gate()
            self._attempt.check_claim()  # a newer attempt may be reading what this one would remove

        removed = prune(
            self._attempt.run_dir,
            self._checkpoint.keep_last,
            run_id=self._attempt.run_id,
            keep_every_steps=self._checkpoint.keep_every_steps,
            keep_best=self._checkpoint.keep_best,
            spared=spared,
            gate=may_go_on,
            on_refusal=lambda folder, error: pruned.refused.append((folder.name, error.message)),
        )
        pruned.removed.extend(removed)

    def _announce(self, commit: Commit, pending: _PendingSave) -> None:
        stall_s, save_s = round(pending.stall.seconds, 6), round(pending.save.seconds, 6)
        self._attempt.write(commit_record(commit, stall_s=stall_s, save_s=save_s))

    def _journal_if_pruned(self, pruning: tuple[int, Work[_Pruned]], *, wait: bool) -> None:
        step, work = pruning
        if all_done(self._engine, work, wait=wait):
            self._pruning = None
            self._journal_pruned(step, work.result)

    def _journal_pruned(self, step: int, pruned: _Pruned) -> None:
        for name in pruned.removed:
            self._attempt.write(CheckpointPruned(step=step, checkpoint=name))
        for refused, problem in pruned.refused:
            self._attempt.write(Incident(incident="prune_failed", problem=problem, checkpoint=refused))

    def journal_withdrawn(self, step: int, names: list[str]) -> None:
        """Journal the checkpoints that a rewind has removed."""
        self._journal_pruned(step, _Pruned(removed=names))

    def _rewound(self) -> dict[str, int]:
        return {REWINDS_KEY: self._num_rewinds} if self._num_rewinds else {}

    def _state(self, progress: Progress) -> TrainerState:
        return TrainerState(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            seed=self._seed,
            schedule={"training_steps": self._num_steps} | _processed(progress) | self._rewound(),
        )


def _processed(progress: Progress) -> dict[str, int]:
    """The tokens of all views, where the number of views has changed during the run."""
    return {"processed_tokens": progress.processed_tokens} if progress.other_views else {}
