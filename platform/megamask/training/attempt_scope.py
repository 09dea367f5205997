"""Context of one attempt on this rank: however the block ends, its end is recorded exactly once."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.provenance.record import code_version
from megamask.provenance.redaction import reason_of
from megamask.resilience.surroundings import explained
from megamask.runs.layout import run_path
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.record import open_run
from megamask.storage.fault_points import reached
from megamask.training.attempt import Attempt, FollowerAttempt, claim_run, record_failure
from megamask.training.checkpointing import CheckpointCommitter
from megamask.training.failure import LOST_PEER, LOST_PEER_HINT, as_hang, end_saving, has_lost_peer, peer_failure, typed
from megamask.training.progress import Progress
from megamask.training.resuming import recorded_schedule
from megamask.training.run_data import RunData
from megamask.training.schedules import check_extension
from megamask.training.stopping import StopReason


class Broadcast(Protocol):
    """The engine as this scope uses it."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""


class Closable(Protocol):
    """The engine as an attempt that was rewound leaves it."""

    def close(self) -> None:
        """Free what it holds."""


@dataclass(kw_only=True)
class AttemptScope:
    """One attempt on this rank, from before the claim to its end. Use `attempt_scope`.

    Args:
        progress: counts of the run, brought up to date by the loop.
        known: the attempt as soon as this rank knows its number: rank 0 by the claim, the others by `share`.
        leader: the same on rank 0, where it also writes the journal and status.json.
        committer: saves that a failure must end; None before there is one.
        engine: that of the attempt; None before there is one.
        reason: why training stopped, once it has.
    """

    run_dir: Path
    rank: int
    progress: Progress
    known: FollowerAttempt | None = None
    leader: Attempt | None = None
    committer: CheckpointCommitter | None = None
    engine: Closable | None = None
    reason: StopReason = StopReason.NONE

    @property
    def attempt(self) -> FollowerAttempt:
        """The attempt, after `share`."""
        if self.known is None:
            raise RuntimeError("the attempt is not shared yet")
        return self.known

    def claim(self, config: TrainConfig, data: RunData) -> None:
        """Claim the run, on rank 0; every refusal comes before the claim.

        Raises:
            UsageError: another run is in the folder, the schedule would change the past, or the run is in use.
            StorageError: the run directory refuses.
        """
        record = open_run(
            self.run_dir,
            config,
            corpora=data.train.corpus_ids,
            tokenizer_digest=data.tokenizer_digest,
            code_version=code_version(),
            parent_checkpoint=None if data.start is None else data.start.record,
        )
        recorded, completed = recorded_schedule(record)
        check_extension(config.optimizer, config.training, recorded_steps=recorded, completed=completed)
        number = claim_run(self.run_dir)
        reached("attempt.claimed")
        # claimed: a failure from here on is recorded
        self.known = FollowerAttempt(self.run_dir, record.run_id, number, record.sha256)
        self.leader = Attempt(
            self.run_dir, record, number, config, recorded_steps=recorded, bytes_per_token=data.bytes_per_token
        )
        self.known = self.leader

    def share(self, engine: Broadcast) -> FollowerAttempt:
        """Let every rank know the attempt that rank 0 has claimed; collective."""
        leader = self.leader
        shared = engine.broadcast_object(None if leader is None else (leader.run_id, leader.number, leader.run_sha256))
        if self.known is None:
            self.known = FollowerAttempt(self.run_dir, *shared)
        return self.known

    def close(self) -> None:
        """Record an end that all ranks agreed on."""
        if self.leader is not None:
            self.leader.close(self.reason, self.progress)

    def release(self) -> None:
        """Free the engine of an attempt that was rewound, before the next one makes its own."""
        self.committer = None
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        gc.collect()

    def ended_by_deadline(self, report: Callable[[MegamaskError], object], code: int, reason: str) -> None:
        """Record the end of a rank that did not answer a signal; called from another thread, right before the end.

        Args:
            report: leaves the error to the launcher.
        """
        report(error_with_code(code, reason))
        sys.stderr.write(f"error: {reason}\n")
        sys.stderr.flush()
        if self.known is None:
            return
        write_rank_failure(self.run_dir, self.known.number, rank=self.rank, exit_code=code, reason=reason)
        if self.rank == 0:
            # 0 before a restore; how far the run had come is not known then
            record_failure(self.known, error_with_code(code, reason), code, step=self.progress.step or None)

    def failed(self, error: BaseException) -> BaseException:
        """Write this rank's failure record. Return the error to raise: a peer's if it is more specific."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        if isinstance(error, OSError):
            error = typed(error)
        error = explained(error) or as_hang(error)
        if self.known is None:
            if self.rank == 0 and isinstance(error, MegamaskError):
                from megamask.engine.process_group import refuse_others

                refuse_others(error)
            return error
        cause, number = error, self.known.number
        code = int(error.exit_code) if isinstance(error, MegamaskError) else int(ExitCode.BUG)
        is_lost = has_lost_peer(error)
        peer = peer_failure(self.run_dir, number, self.rank, is_lost=is_lost) if code == ExitCode.BUG else None
        if peer is not None:
            error, code = peer, int(peer.exit_code)
        else:
            error = MegamaskError(LOST_PEER, hint=LOST_PEER_HINT) if is_lost else error
            write_rank_failure(self.run_dir, number, rank=self.rank, exit_code=code, reason=reason_of(error))
        if self.committer is not None:  # after the failure record: a launcher waits only so long for the process
            end_saving(self.committer, cause)
        if self.leader is not None:
            self.leader.fail(error, code, self.progress)
        elif self.rank == 0:
            record_failure(self.known, error, code)
        return error


@contextlib.contextmanager
def attempt_scope(config: TrainConfig, data: RunData, rank: int) -> Iterator[AttemptScope]:
    """Yield the scope of an attempt on this rank; record its end.

    Raises:
        BaseException: that of the block, or the failure of a peer that explains it.
    """
    shape = data.objective.at(1).shape(config.training.sequence_length)
    scope = AttemptScope(
        run_dir=run_path(config.run.output_dir, config.run.name),
        rank=rank,
        progress=Progress(num_views=shape.num_views),
    )
    try:
        yield scope
    except BaseException as error:
        raised = scope.failed(error)
        if raised is error:
            raise
        raise raised from error
    scope.close()
