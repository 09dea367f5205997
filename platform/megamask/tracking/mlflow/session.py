"""Sending a run's journal to MLflow piece by piece, from the place that tracking/mlflow.json remembers.

The state is read again before each piece and replaced after it, under a lock: a training and a `megamask sync`, or two
of them, take turns and go on where the other one stopped. Sending a piece again, after an interruption before it was
remembered, changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config.schema.tracking import MLflowConfig
from megamask.errors import UsageError
from megamask.runs.configs import attempt_configs, newest_config
from megamask.runs.record import read_run
from megamask.storage.fault_points import reached
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.journal.lines import read_journal
from megamask.tracking.journal.tail import Position, read_new
from megamask.tracking.mlflow.client import MLflowRun, open_run
from megamask.tracking.mlflow.description import description_of
from megamask.tracking.mlflow.points import LOSS, Memory, RunStatus, Update, milliseconds, update_of
from megamask.tracking.mlflow.state import SinkState, load_state, save_state, sending
from megamask.tracking.mlflow.store import shown_uri, store_of

# One piece is a few requests, so that a server that answers only now and then still gets on.
_PIECE_BYTES = 1 << 17


class Session:
    """A connection that knows its MLflow run and what was sent to it. Use `Session.open`.

    Args:
        keeps_state: the state is stored; a sync to another server than the run's own leaves the file alone.
        kept_times: see `points.update_of`.
    """

    def __init__(
        self, run: MLflowRun, run_dir: Path, state: SinkState, *, keeps_state: bool, kept_times: dict[int, int]
    ) -> None:
        self.run = run
        self._run_dir = run_dir
        self._record: Mapping[str, Any] = {}
        self._state = state
        self._keeps_state = keeps_state
        self._kept_times = kept_times
        self.num_sent = 0

    @classmethod
    def open(cls, run_dir: Path, config: MLflowConfig, *, keeps_foreign_state: bool = False) -> Session:
        """Find the run in MLflow or create it, and describe it there.

        Args:
            keeps_foreign_state: the stored state of another server stays; that of this connection is not stored.

        Raises:
            BusyError: another process is sending just now.
            Exception: any error of MLflow, its database or the network.
        """
        record = read_run(run_dir)
        uri = shown_uri(store_of(run_dir, config).uri)
        with sending(run_dir):
            stored = load_state(run_dir)
            is_here = stored is not None and stored.uri == uri
            first = next(read_journal(run_dir), None)  # MLflow may come late: the run began with its first line
            run, is_known = open_run(
                run_dir,
                config,
                run_id=record.run_id,
                known=(stored.experiment_id, stored.run_id) if stored is not None and is_here else None,
                start_ms=None if first is None else milliseconds(first["time"]),
            )
            keeps_state = stored is None or is_here or not keeps_foreign_state
            kept_times: dict[int, int] = {}
            if stored is not None and is_known:
                state = stored
            else:  # the file or the run was lost: what the run's tag finds is sent to anew
                state = SinkState(uri=uri, experiment_id=run.experiment_id, run_id=run.run_id)
                kept_times = {point.step: point.timestamp_ms for point in run.history(LOSS)}
            session = cls(run, run_dir, state, keeps_state=keeps_state, kept_times=kept_times)
            session._describe(record.content)
            session._save()
        return session

    def send_new(self) -> None:
        """Send every record that was added since the last call, remembering the place after each piece.

        `num_sent` counts them.

        Raises:
            BusyError: another process is sending just now.
            Exception: any error of MLflow, its database or the network.
        """
        while True:
            with sending(self._run_dir):
                self._read_state()
                records, position = read_new(self._run_dir, self._state.position, max_bytes=_PIECE_BYTES)
                if position == self._state.position:
                    self._send_configs()
                    return
                self._send(update_of(records, self._state.memory, self._kept_times))
                reached("mlflow.sent")
                self._state.position = position
                self._save()
            self.num_sent += len(records)

    def forget(self) -> None:
        """Begin with the journal's first line again: MLflow lost something that it had taken."""
        with sending(self._run_dir):
            self._state.position, self._state.memory, self._state.artifacts = Position(), Memory(), []
            self._kept_times = {point.step: point.timestamp_ms for point in self.run.history(LOSS)}
            self._save()

    def end(self, status: RunStatus, time_ms: int) -> None:
        """Set the status that an attempt without a last line leaves behind."""
        with sending(self._run_dir):
            self.run.set_status(status, time_ms)

    def count_checkpoints(self) -> int:
        """Return the number of entered commits; remove an entry that a late answer duplicated."""
        with sending(self._run_dir):
            return self.run.num_checkpoints()

    def _read_state(self) -> None:
        """Adopts what another process has sent meanwhile to the same run."""
        stored = load_state(self._run_dir) if self._keeps_state else None
        if stored is not None and stored.target == self._state.target:
            self._state = stored

    def _save(self) -> None:
        if self._keeps_state:
            save_state(self._run_dir, self._state)

    def _describe(self, record: Mapping[str, Any]) -> None:
        """Set parameters and tags from run.json and the newest config."""
        self._record = record
        self.run.log_params(record.get("identity", {}))
        tags = {
            "mlflow.source.name": "megamask train",
            "mlflow.source.type": "LOCAL",
            "run_dir": str(self._run_dir),
            "code_version": record.get("code_version"),
            "tokenizer_digest": record.get("tokenizer_digest"),
        }
        tags |= {f"corpus.{name}": value for name, value in record.get("corpora", {}).items()}
        extendable = dict(record.get("extendable", {}))
        with contextlib.suppress(UsageError):  # a config of another version: the steps that the run began with
            if (config := newest_config(self._run_dir)) is not None:
                extendable["training.steps"] = config.training.steps
        self.run.set_tags(tags | extendable)

    def _send(self, update: Update) -> None:
        run = self.run
        run.log_params(update.params)
        run.log_datasets(update.datasets)  # before the points that were measured on them
        run.log_points(update.points)
        run.set_tags(update.tags)
        for entry in update.checkpoints:
            run.log_checkpoint(entry, self._run_dir / entry.location / "COMMIT.json")
        if update.best is not None:
            run.set_best(update.best)
        for checkpoint, tags in update.marks.items():
            run.mark_checkpoint(checkpoint, tags)
        for path, text in update.texts.items():
            run.log_text(path, text)
        if update.is_described_anew:
            memory = self._state.memory
            text = description_of(self._record, memory)
            run.describe(text, memory.notes)
            memory.notes = [sha256_bytes(text.encode())]
        if update.status is not None:
            run.set_status(update.status, update.status_time_ms)

    def _send_configs(self) -> None:
        """Each attempt's config, once."""
        for path in attempt_configs(self._run_dir).values():
            if path.name not in self._state.artifacts:
                self.run.log_file(path, "config")
                self._state.artifacts.append(path.name)
                self._save()
