"""One attempt of a run, as rank 0 records it: the claim, the journal and its readers, status.json."""

from __future__ import annotations

import getpass
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamask.checkpoint.loader import Loaded
from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, MegamaskError, SupersededError
from megamask.models.counts import parameter_count
from megamask.provenance.record import code_version, library_versions
from megamask.provenance.redaction import reason_of, redact, redact_values
from megamask.resilience.numerics import RefusedStepError
from megamask.resilience.process_facts import node_name
from megamask.runs.claims import claim, claimed_attempts, is_superseded, refuse_if_superseded
from megamask.runs.configs import store_attempt_config
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.record import RunRecord
from megamask.runs.status import Phase, Status, write_status
from megamask.tracking.console import Console
from megamask.tracking.journal.seek import newest_start
from megamask.tracking.journal.writer import Journal
from megamask.tracking.mlflow.sink import MLflowSink
from megamask.tracking.records import AttemptEnded, AttemptStarted, JournalRecord, RunCompleted, RunStarted
from megamask.training.announcing import commit_record, is_announced
from megamask.training.batch_size import consumed_before
from megamask.training.datasets import described_datasets
from megamask.training.progress import Progress
from megamask.training.resuming import last_attempt_of
from megamask.training.run_data import RunData
from megamask.training.stopping import StopReason

# Claims are looked at between steps, at most this often; a commit looks at them again.
_CLAIM_CHECK_S = 0.2
# Seconds that an attempt waits for MLflow after a failure or a stop request: schedulers kill after 30 seconds.
_HASTY_DRAIN_S = 10.0
# Records that carry sentences which a library, a system or a person wrote.
_IN_WORDS = frozenset({"incident", "attempt_ended"})
_log = logging.getLogger(__name__)


class FollowerAttempt:
    """An attempt as every rank knows it; rank 0's Attempt also writes."""

    def __init__(self, run_dir: Path, run_id: str, number: int, run_sha256: str | None = None) -> None:
        self.run_dir = run_dir
        self.run_id = run_id
        self.number = number
        self.run_sha256 = run_sha256

    def append(self, kind: str, **fields: Any) -> None:
        """Journal a record; only rank 0 writes it."""

    def write(self, record: JournalRecord) -> None:
        """Journal a typed record; only rank 0 writes it."""
        self.append(record.kind, **record.to_json())

    def durable_journal_head(self) -> tuple[int, str]:
        """(seq, sha256) of the journal's last line, flushed; only rank 0's is used."""
        return 0, "0" * 64

    def is_superseded(self) -> bool:
        """Return whether a newer attempt has claimed the run; rank 0 looks, the ranks agree on its answer."""
        return False

    def check_claim(self) -> None:
        """Raise SupersededError when a newer attempt has claimed the run; only rank 0 looks."""


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return None


def claim_run(run_dir: Path) -> int:
    """Claim a run for this process. Return the number of the new attempt.

    Raises:
        UsageError: another live process holds the run; nothing was written.
        StorageError: the run directory refuses.
    """
    return claim(run_dir, known_attempt=last_attempt_of(run_dir), redact=redact)


def record_failure(view: FollowerAttempt, error: BaseException, exit_code: int, *, step: int | None = None) -> None:
    """Put the end of an attempt whose journal could not even be opened into status.json, where it is still its own."""
    try:
        if not is_superseded(view.run_dir, view.number):
            reason = redact(reason_of(error))
            node = node_name()
            write_status(
                view.run_dir,
                Status(
                    attempt=view.number,
                    phase=_phase_of(exit_code),
                    exit_code=exit_code,
                    step=step,
                    node=node,
                    reason=reason,
                ),
            )
    except (MegamaskError, OSError) as refusal:
        _log.warning("the end of attempt %d could not be written: %r", view.number, refusal)


def _phase_of(exit_code: int) -> Phase:
    """The phase of an attempt that ended early, with an error or because a signal asked for it."""
    early: dict[int, Phase] = {ExitCode.PREEMPTED: "preempted", ExitCode.DO_NOT_REQUEUE: "stopped"}
    return early.get(exit_code, "failed")


class Attempt(FollowerAttempt):
    """Rank 0's attempt, after the claim; exactly one of `close` and `fail` ends it.

    Args:
        number: what `claim_run` returned.

    Raises:
        StorageError: the run directory refuses; `record_failure` records it.
    """

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        number: int,
        config: TrainConfig,
        *,
        recorded_steps: int,
        bytes_per_token: float | None,
    ) -> None:
        super().__init__(run_dir, record.run_id, number, record.sha256)
        self.record = record
        self._config = config
        self._recorded_steps = recorded_steps
        self._last_check = time.monotonic()
        self._node = node_name()
        self.config_path = store_attempt_config(run_dir, self.number, config)
        self.write_status("starting", step=None)
        self.journal = Journal.open(run_dir, self.number, rotate_bytes=config.tracking.journal_file_mib * 2**20)
        self._is_tracked = False
        self._resumed_step: int | None = None  # known when the attempt has started
        self._is_first = self.journal.head[0] == 0  # an attempt that died at once may have left run.json and no line
        num_samples = consumed_before(config.training.steps + 1, config.training)
        self.console = Console(config, bytes_per_token=bytes_per_token, num_samples=num_samples)
        self.journal.subscribe(self.console.on_record)
        self.sink = (
            MLflowSink(run_dir, config.tracking.mlflow, on_incident=self._incident, redact=redact)
            if config.tracking.mlflow.enabled
            else None
        )

    def append(self, kind: str, **fields: Any) -> None:
        """Journal a record; the console and MLflow read it from there. Text that others wrote is redacted."""
        self.journal.append(kind, **(redact_values(fields) if kind in _IN_WORDS else fields))

    def _incident(self, incident: str, problem: str) -> None:
        self.append("incident", incident=incident, problem=problem)

    def durable_journal_head(self) -> tuple[int, str]:
        """(seq, sha256) of the last line, after flushing the journal."""
        return self.journal.durable_head()

    def is_superseded(self) -> bool:
        """Look at the claims, at most five times a second."""
        now = time.monotonic()
        if now - self._last_check < _CLAIM_CHECK_S:
            return False
        self._last_check = now
        return is_superseded(self.run_dir, self.number)

    def check_claim(self) -> None:
        """Raise SupersededError when a newer attempt has claimed the run."""
        refuse_if_superseded(self.run_dir, self.number)

    def started(
        self,
        data: RunData,
        loaded: Loaded,
        *,
        world_size: int,
        machine: Mapping[str, Any],
        startup_s: Mapping[str, float],
    ) -> None:
        """Journal who trains, where, on what and from what; the readers of the journal begin."""
        if self._is_first:
            corpora = dict(self.record.content["corpora"])
            self.write(RunStarted(run_id=self.run_id, corpora=corpora, run_sha256=self.run_sha256))
        steps, layout = self._config.training.steps, asdict(self._config.layout)
        commit = loaded.commit
        self._resumed_step = 0 if commit is None else commit.step
        self.write(
            AttemptStarted(
                attempt=self.number,
                run_id=self.run_id,
                run_sha256=self.run_sha256,
                host=self._node,
                user=_user(),
                world_size=world_size,
                device=machine["device"],
                layout=layout,
                num_micro_batches=self._num_micro_batches(),
                num_parameters=parameter_count(data.spec),
                num_threads=machine.get("num_threads"),
                datasets=described_datasets({"train": data.train, "validation": data.validation}),
                code_version=code_version(),
                libraries=dict(library_versions()),
                resumed_from=None
                if commit is None
                else {"step": commit.step, "checkpoint": commit.folder.name, "digest": commit.digest},
                initialised_from=None if commit is not None or data.start is None else dict(data.start.record),
                extended=None if steps == self._recorded_steps else {"training.steps": [self._recorded_steps, steps]},
                changed=self._changed(layout, world_size, machine["device"]),
                restore_s=None if commit is None else startup_s["restore"],
                startup_s=dict(startup_s),
                layers=machine["layers"],
                fp8=machine["fp8"],
                skipped_samples=[[each.start, each.stop] for each in data.train.skipped.ranges] or None,
            )
        )
        if commit is not None and not is_announced(self.run_dir, commit):
            self.write(commit_record(commit, stall_s=None, save_s=None))
        for incident in loaded.incidents:
            self.append("incident", **incident)
        if self.sink is not None:
            self.sink.start()
            self._is_tracked = True

    def _changed(self, layout: Mapping[str, Any], world_size: int, device: str) -> dict[str, Any] | None:
        """Return what the attempt before had otherwise, as [old, new] by name; None for the first attempt."""
        before = newest_start(self.run_dir, before=self.number)
        if before is None:
            return None
        new = {
            **{f"layout.{name}": value for name, value in layout.items()},
            "world_size": world_size,
            "device": device,
        }
        old = {f"layout.{name}": value for name, value in (before.layout or {}).items()}
        old |= {"world_size": before.world_size, "device": before.device}
        return {name: [old[name], value] for name, value in new.items() if name in old and old[name] != value}

    def _num_micro_batches(self) -> int:
        """Passes whose gradients a data-parallel rank accumulates in a step of training.global_batch_size samples."""
        training = self._config.training
        return training.global_batch_size // (self._config.layout.data_parallel_size * training.micro_batch_size)

    def running(self, step: int) -> None:
        """Replace status.json by phase running at this step."""
        self.write_status("running", step=step)

    def write_status(self, phase: Phase, *, reason: str | None = None, **facts: Any) -> None:
        """Replace status.json, unless a newer attempt has claimed the run: then it is that one's."""
        if is_superseded(self.run_dir, self.number):
            return
        reason = None if reason is None else redact(reason)
        write_status(self.run_dir, Status(attempt=self.number, phase=phase, node=self._node, reason=reason, **facts))

    def close(self, reason: StopReason, progress: Progress) -> None:
        """Record an end that all ranks agreed on; a superseded attempt writes to its own folder only."""
        if reason is StopReason.SUPERSEDED:
            newest = max(claimed_attempts(self.run_dir, after=self.number), default=None)
            ending = reason.description if newest is None else f"superseded by attempt {newest}"
            write_rank_failure(self.run_dir, self.number, rank=0, exit_code=int(reason.exit_code), reason=ending)
        else:
            self._end(reason.phase, int(reason.exit_code), progress.step, reason.description)
            if reason is StopReason.FINISHED:
                self.write(RunCompleted(step=progress.step, consumed_tokens=progress.consumed_tokens))
        self._shut(is_hasty=reason.exit_code != ExitCode.DONE)

    def fail(self, error: BaseException, exit_code: int, progress: Progress) -> None:
        """The attempt ends with an error; a superseded one writes nothing that is not its own."""
        reason = reason_of(error)
        try:
            if isinstance(error, RefusedStepError):
                self.append("incident", **error.incident)
            if not isinstance(error, SupersededError):
                # a full disk may take the end's line and not that of the last step
                journalled = self.journal.last_step or self._resumed_step
                self._end(_phase_of(exit_code), exit_code, progress.step if journalled is None else journalled, reason)
            self._shut(is_hasty=True)
        except Exception as refusal:  # noqa: BLE001  the attempt's own error is reported, even if more fails now
            _log.warning("the end of attempt %d could not be written: %r", self.number, refusal)

    def _end(self, phase: Phase, exit_code: int, step: int, reason: str) -> None:
        self.write(AttemptEnded(attempt=self.number, phase=phase, exit_code=exit_code, step=step, reason=reason))
        head = self.journal.durable_head()
        self.write_status(phase, step=step, exit_code=exit_code, reason=reason, journal=[*head])

    def _shut(self, *, is_hasty: bool) -> None:
        self.console.close()
        patience = self._config.tracking.mlflow.drain_timeout_s
        if is_hasty:
            patience = min(patience, _HASTY_DRAIN_S)
        if self._is_tracked and self.sink is not None and not self.sink.drain(patience):
            _log.warning(
                "MLflow did not receive everything within %g s; the journal has it, `megamask sync` sends it", patience
            )
        self.journal.close()
