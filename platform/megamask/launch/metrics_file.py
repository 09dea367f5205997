"""Text file of a node's figures for Prometheus, in a folder that a textfile collector reads.

The format (Prometheus text exposition format 0.0.4) is three kinds of lines, so no client library is needed. A file has
no series of another node or run: its name follows from the labels, and the next attempt replaces it. Times of events
are exported as timestamps: their age is `time() - timestamp`, which grows also where a dead node's file stays behind.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from megamask.errors import MegamaskError
from megamask.resilience.heartbeat import Mark
from megamask.resilience.process_facts import node_name
from megamask.resilience.signals import STOP_SIGNALS
from megamask.storage.durable import make_folders, write_atomic

PERIOD_S = 15.0
# Storage that does not answer keeps a node from its exit code no longer than this.
_LAST_WRITE_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, its type and its meaning.

    Args:
        of_run: figure of the run, which node 0 alone writes.
    """

    name: str
    type: Literal["counter", "gauge"] = "gauge"
    help: str
    of_run: bool = False


METRICS = (
    Metric(name="megamask_up", help="1 while the launcher of this node runs, 0 after its end"),
    Metric(name="megamask_node_info", help="1; the label host names the machine"),
    Metric(name="megamask_exit_code", help="exit code of the job; missing before its end"),
    Metric(name="megamask_written_timestamp_seconds", help="when this file was written"),
    Metric(name="megamask_step", help="step that the slowest rank of this node takes or has completed last"),
    Metric(
        name="megamask_last_step_timestamp_seconds",
        help="when the slowest rank of this node got to its step; before the first one, when the launcher started",
    ),
    Metric(name="megamask_restarts_total", type="counter", help="attempts of the run before the newest", of_run=True),
    Metric(name="megamask_loss_nats_per_token", help="loss of the newest step in the journal", of_run=True),
    # no counter: a restart goes back to a checkpoint, which Prometheus would take for a counter that began anew
    Metric(name="megamask_consumed_tokens", help="tokens that the run has consumed", of_run=True),
    Metric(name="megamask_tokens_per_second", help="speed of the newest step in the journal", of_run=True),
    Metric(name="megamask_checkpoint_step", help="step of the newest checkpoint", of_run=True),
)


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures of a run; None for what is not known yet, which is left out of the file."""

    restarts: int | None = None
    loss_nats_per_token: float | None = None
    consumed_tokens: int | None = None
    tokens_per_second: float | None = None
    checkpoint_step: int | None = None


def exposition(values: Mapping[str, float | None], labels: Mapping[str, str], *, host: str) -> str:
    """Return the text of a file.

    Args:
        values: by the name of a metric of METRICS; None leaves it out.
        labels: of every series.
        host: label of megamask_node_info alone.
    """
    return "".join(_families(values, labels, host))


def _families(values: Mapping[str, float | None], labels: Mapping[str, str], host: str) -> Iterator[str]:
    for metric in METRICS:
        if (value := values.get(metric.name)) is None:
            continue
        own = {**labels, "host": host} if metric.name == "megamask_node_info" else labels
        meaning = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {metric.name} {meaning}\n# TYPE {metric.name} {metric.type}\n"
        yield f"{metric.name}{{{','.join(_label(name, own[name]) for name in own)}}} {_number(value)}\n"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{name}="{escaped}"'


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


class MetricsFile:
    """Writer of a node's file: at once, every PERIOD_S, and at the end.

    A thread writes, so storage that does not answer holds up neither the ranks nor their signals. A write that fails is
    logged once, and tried again.

    Args:
        folder: that the collector reads; made where it is missing.
        run: name of the run.
        node: number of this node in the job.
        figures: returns the figures of the run; None on other nodes than the first.
    """

    def __init__(self, folder: Path, run: str, node: int, figures: Callable[[], RunFigures] | None = None) -> None:
        self.path = folder / f"megamask-{run}-{node}.prom"
        self.exit_code: int | None = None
        self._labels = {"run": run, "node": str(node)}
        self._figures = figures
        self._step: int | None = None
        self._stepped_at = time.time()
        self._has_ended = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="metrics-file", daemon=True)

    def __enter__(self) -> MetricsFile:
        self._thread.start()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: TracebackType | None) -> None:
        if self.exit_code is None and isinstance(error, MegamaskError):
            self.exit_code = int(error.exit_code)
        self._has_ended.set()
        self._thread.join(_LAST_WRITE_S)

    def take(self, marks: Iterable[Mark | None]) -> None:
        """Take in the progress marks of the node's running ranks; None is one that has not begun."""
        step = min((0 if mark is None else mark.step for mark in marks), default=0)
        if step != self._step:
            if self._step is not None:
                self._stepped_at = time.time()
            self._step = step

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they are to wake the thread that watches the ranks
        is_last = False
        while not is_last:
            self._write(is_last=False)
            is_last = self._has_ended.wait(PERIOD_S)
        self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        try:
            text = exposition(self._values(is_last), self._labels, host=node_name())
            make_folders(self.path.parent)
            write_atomic(self.path, text.encode())
        except (MegamaskError, OSError) as failure:
            if not self._has_failed:
                _log.warning(
                    "the metrics of this node are not written, training goes on: %s (launch.metrics_folder)", failure
                )
            self._has_failed = True

    def _values(self, is_last: bool) -> dict[str, float | None]:
        figures = RunFigures() if self._figures is None else self._figures()
        return {
            "megamask_up": 0 if is_last else 1,
            "megamask_node_info": 1,
            "megamask_exit_code": self.exit_code if is_last else None,
            "megamask_written_timestamp_seconds": time.time(),
            "megamask_step": self._step,
            "megamask_last_step_timestamp_seconds": self._stepped_at,
            "megamask_restarts_total": figures.restarts,
            "megamask_loss_nats_per_token": figures.loss_nats_per_token,
            "megamask_consumed_tokens": figures.consumed_tokens,
            "megamask_tokens_per_second": figures.tokens_per_second,
            "megamask_checkpoint_step": figures.checkpoint_step,
        }
