"""Progress of a training for a person: a reader of the journal that draws on a terminal or writes plain lines.

Everything goes to stderr; stdout belongs to the command's result. A console that fails is silenced, training goes on.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from megamask.config.schema.roots import TrainConfig
from megamask.tracking.journal.lines import Record as Line
from megamask.tracking.records import (
    AttemptEnded,
    AttemptStarted,
    CheckpointCommitted,
    Evaluation,
    Incident,
    JournalRecord,
    RunCompleted,
    SamplePreview,
    Step,
    Straggler,
    read_record,
)

if TYPE_CHECKING:
    from rich.progress import Progress

_log = logging.getLogger(__name__)
_REDRAW_S = 0.25
_PROMPT_CHARACTERS = 30  # of a preview's prompt, its end
_TEXT_CHARACTERS = 100  # of a preview's text, its beginning
_RATE_STEPS = 20  # steps that the shown speed and the remaining time are averaged over


class Console:
    """Shows the lines of a journal; subscribe `on_record` to it and `close` at the end.

    Args:
        config: for the number of steps and how often a line is due.
        bytes_per_token: UTF-8 bytes of the training text per eligible token; None shows no bits per byte.
        num_samples: samples of the run, so that the remaining time counts a growing batch; None goes by steps.
        stream: where to write, by default stderr.
        is_terminal: draw a progress display; by default whether the stream is a terminal.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        bytes_per_token: float | None = None,
        num_samples: int | None = None,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
    ) -> None:
        self._num_steps = config.training.steps
        self._every = config.tracking.console_every_steps
        self._bytes_per_token = bytes_per_token
        self._num_samples = num_samples
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty() if is_terminal is None else is_terminal
        self._display: Progress | None = None
        self._speed = _Speed()
        self._last_checkpoint: int | None = None
        self._drawn = -math.inf
        self._is_broken = False

    def on_record(self, line: Line) -> None:
        """Show a journal line; never raises."""
        if self._is_broken:
            return
        try:
            record = read_record(line)
            if isinstance(record, Step):
                self._show_step(record)
            elif record is not None and (text := _event_text(record)) is not None:
                if isinstance(record, CheckpointCommitted):
                    self._last_checkpoint = record.step
                elif isinstance(record, AttemptStarted) and record.resumed_from:
                    self._last_checkpoint = record.resumed_from.get("step")
                self._write(text)
        except Exception as error:  # noqa: BLE001  a closed terminal or a malformed record must not stop training
            self._give_up(error)

    def close(self) -> None:
        """End the display; a second call does nothing."""
        display, self._display = self._display, None
        if display is not None:
            try:
                display.stop()
            except Exception as error:  # noqa: BLE001  as above
                self._give_up(error)

    def _show_step(self, record: Step) -> None:
        self._speed.add(record)
        is_last = record.step >= self._num_steps
        if self._is_terminal:
            self._draw(record)
        elif record.step == 1 or is_last or record.step % self._every == 0:
            self._write(f"step {record.step}/{self._num_steps} · {' · '.join(self._facts(record))}")

    def _facts(self, record: Step) -> list[str]:
        speed = self._speed
        facts = [f"{_count(record.consumed_tokens)} tokens", f"loss {_number(record.loss)}"]
        bits = bits_per_byte(record.nelbo_nats_per_token, self._bytes_per_token)
        if bits is not None:
            facts.append(f"{bits:.3f} bits/byte")
        facts.append(f"grad norm {_number(record.grad_norm)}")
        if speed.tokens_per_second is not None:
            facts.append(f"{_count(round(speed.tokens_per_second))} tokens/s")
        if speed.data_share is not None:
            facts.append(f"data wait {100 * speed.data_share:.1f} %")
        if speed.seconds_per_step is not None:
            facts.append(f"ETA {_duration(self._remaining_steps(record) * speed.seconds_per_step)}")
        facts.append("no checkpoint yet" if self._last_checkpoint is None else f"checkpoint {self._last_checkpoint}")
        return facts

    def _remaining_steps(self, record: Step) -> float:
        """Steps still to go; where the run's samples are known, in steps as large as the last ones were."""
        samples = self._speed.samples_per_step
        if self._num_samples is None or samples is None or record.consumed_samples is None:
            return float(self._num_steps - record.step)
        return (self._num_samples - record.consumed_samples) / samples

    def _draw(self, record: Step) -> None:
        if self._display is None:
            self._display = _start_display(self._stream, self._num_steps)
        facts = " · ".join(self._facts(record))
        self._display.update(self._display.task_ids[0], completed=record.step, facts=facts)
        now = time.monotonic()
        if now - self._drawn >= _REDRAW_S or record.step >= self._num_steps:
            self._drawn = now
            self._display.refresh()

    def _write(self, text: str) -> None:
        if self._display is not None:
            self._display.console.print(text, markup=False, highlight=False, emoji=False)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _give_up(self, error: Exception) -> None:
        self._is_broken = True
        _log.warning("the console stopped showing progress: %r; the journal goes on", error)


def _start_display(stream: TextIO, num_steps: int) -> Progress:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    class Terminal(RichConsole):
        def on_broken_pipe(self) -> None:
            """Raise: rich would end the process here, and point its stdout elsewhere."""
            raise OSError("the terminal is gone")

    class Display(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            """Yield the bar and, below it, the facts of the last step."""
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(task.fields["facts"])

    display = Display(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        console=Terminal(file=stream, force_terminal=True),
        auto_refresh=False,  # no thread of its own
        redirect_stdout=False,
        redirect_stderr=False,
    )
    display.add_task("steps", total=num_steps, facts="")
    display.start()
    return display


@dataclass(frozen=True)
class _Pace:
    """Wall seconds, seconds of waiting for data, eligible tokens and samples of one step."""

    seconds: float
    data: float
    tokens: float
    samples: float


class _Speed:
    """Moving averages over the last steps; the first step of an attempt, which starts everything up, is left out."""

    def __init__(self) -> None:
        self._recent: deque[_Pace] = deque(maxlen=_RATE_STEPS)
        self._num_seen = 0
        self._arrived: float | None = None

    def add(self, record: Step) -> None:
        """Take in one step line."""
        now, phases = time.monotonic(), record.seconds or {}
        between = 0.0 if self._arrived is None else now - self._arrived  # saving and evaluating included
        self._arrived = now
        seconds = sum(phases.values())
        if self._num_seen == 1:
            self._recent.clear()
        self._num_seen += 1
        tokens = (record.tokens_per_second or 0.0) * seconds
        samples = record.global_batch_size or 0
        self._recent.append(_Pace(max(seconds, between), phases.get("data", 0.0), tokens, samples))

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall time of the last steps."""
        seconds = sum(pace.seconds for pace in self._recent)
        return seconds / len(self._recent) if seconds > 0 else None

    @property
    def data_share(self) -> float | None:
        """Share of the last steps spent waiting for data."""
        return self._per_second(sum(pace.data for pace in self._recent))

    @property
    def tokens_per_second(self) -> float | None:
        """Eligible tokens per second over the last steps."""
        return self._per_second(sum(pace.tokens for pace in self._recent)) or None

    @property
    def samples_per_step(self) -> float | None:
        """Mean batch size of the last steps."""
        samples = sum(pace.samples for pace in self._recent)
        return samples / len(self._recent) if samples > 0 else None

    def _per_second(self, total: float) -> float | None:
        seconds = sum(pace.seconds for pace in self._recent)
        return total / seconds if seconds > 0 else None


def bits_per_byte(nelbo_nats_per_token: float | None, bytes_per_token: float | None) -> float | None:
    """Return the bound in bits per byte of text: nats per token / ln 2 / bytes per token; None if one is unknown."""
    if nelbo_nats_per_token is None or not bytes_per_token or not math.isfinite(nelbo_nats_per_token):
        return None
    return nelbo_nats_per_token / math.log(2) / bytes_per_token


def event_line(line: Line) -> str | None:
    """Return the text for a journal line that is not a step; None for lines that a person need not see."""
    record = read_record(line)
    return None if record is None else _event_text(record)


def _kind_of_bound(objective: Mapping[str, Any]) -> str:
    if not objective:
        return ""
    size = objective.get("block_size")
    return f" as {objective['name']}" + ("" if size is None else f" of blocks of {size}")


def _pair_variance(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    return f", variance of the pair {found['ratio']:.2f} of two views' ({found['low']:.2f} to {found['high']:.2f})"


def _event_text(record: JournalRecord) -> str | None:
    match record:
        case AttemptStarted():
            return _started(record)
        case Evaluation():
            error, bits = record.standard_error, record.bits_per_byte
            return (
                f"evaluation at step {record.step}: {_number(record.nelbo_nats_per_token)} nats/token"
                + _kind_of_bound(record.objective or {})
                + ("" if error is None else f" (standard error {error:.2g})")
                + ("" if bits is None else f", {bits:.3f} bits/byte")
                + _pair_variance(record.pair_variance or {})
            )
        case SamplePreview():
            return "\n".join(f"preview at step {record.step}: {text}" for text in _previews(record)) or None
        case CheckpointCommitted():
            digest = "" if record.digest is None else f" ({record.digest[:12]})"
            waited = "" if record.stall_s is None else f", training waited {record.stall_s:.2f} s"
            return f"checkpoint of step {record.step} committed{digest}{waited}"
        case Incident():
            return f"incident: {record.incident}: {record.problem}"
        case Straggler():
            return (
                f"rank {record.rank} on {record.node} is slow: {_number(record.seconds_per_step)} s a step in "
                f"{record.section}, where the median is {_number(record.median_s)} s"
            )
        case AttemptEnded():
            reason = f": {record.reason}" if record.reason else ""
            return f"attempt ended at step {record.step} with exit code {record.exit_code}{reason}"
        case RunCompleted():
            return f"run completed at step {record.step}"
        case _:
            return None


def _started(record: AttemptStarted) -> str:
    """Name the attempt, what it resumed from and what differs from the attempt before."""
    text = f"attempt {record.attempt} started"
    if record.resumed_from:
        taken = "" if record.restore_s is None else f" in {record.restore_s:.1f} s"
        text += f", resumed from step {record.resumed_from.get('step')}{taken}"
    changes = [f"{key} {old} -> {new}" for key, (old, new) in (record.extended or {}).items()]
    changes += [f"{key} {old} -> {new}" for key, (old, new) in (record.changed or {}).items()]
    return text + ("".join(f"; {change}" for change in changes))


def _previews(record: SamplePreview) -> list[str]:
    """Prompt and text of each sample, quoted; the beginning of the prompt and the end of the text are cut off."""
    lines = []
    for sample in record.samples:
        prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        before = "..." + prompt[-_PROMPT_CHARACTERS:] if len(prompt) > _PROMPT_CHARACTERS else prompt
        after = text[:_TEXT_CHARACTERS] + "..." if len(text) > _TEXT_CHARACTERS else text
        # repr escapes every control character, so that a terminal executes nothing of it
        lines.append(f"{before!r} -> {after!r}" if prompt else repr(after))
    return lines


def _number(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.4g}" if abs(number) >= 1000 or abs(number) < 0.01 else f"{number:.4f}"


def _count(number: float | None) -> str:
    if number is None or not math.isfinite(number):
        return "-"
    for threshold, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= threshold:
            return f"{number / divisor:.3g}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
