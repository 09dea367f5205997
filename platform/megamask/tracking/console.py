"""What a person sees while training: a reader of the journal that draws on a terminal or writes plain lines.

Everything goes to stderr; stdout belongs to the command's result. A console that fails goes silent, training goes on.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from megamask.config.schema.roots import TrainConfig
from megamask.tracking.journal.lines import Record

if TYPE_CHECKING:
    from rich.live import Live

_log = logging.getLogger(__name__)
_REDRAW_S = 0.25
_PROMPT_CHARACTERS = 30  # of a preview's prompt, its end
_TEXT_CHARACTERS = 100  # of a preview's text, its beginning
_RATE_STEPS = 20  # steps that the shown speed and the remaining time are averaged over


class Console:
    """Shows the records of a journal; subscribe `on_record` to it and `close` at the end.

    Args:
        config: for the number of steps and how often a line is due.
        bytes_per_token: UTF-8 bytes of the training text per eligible token; None shows no bits per byte.
        num_samples: samples of the whole run, so that the remaining time counts a growing batch; None goes by steps.
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
        self._display: Live | None = None
        self._speed = _Speed()
        self._last_checkpoint: int | None = None
        self._drawn = -math.inf
        self._is_broken = False

    def on_record(self, record: Record) -> None:
        """Shows a record; never raises."""
        if self._is_broken:
            return
        try:
            if record["kind"] == "step":
                self._show_step(record)
            elif (line := event_line(record)) is not None:
                if record["kind"] == "checkpoint_committed":
                    self._last_checkpoint = record.get("step")
                self._write(line)
        except Exception as error:  # noqa: BLE001  a closed terminal or a strange record is no reason to stop training
            self._give_up(error)

    def close(self) -> None:
        """Ends the display; a second call does nothing."""
        display, self._display = self._display, None
        if display is not None:
            try:
                display.stop()
            except Exception as error:  # noqa: BLE001  as above
                self._give_up(error)

    def _show_step(self, record: Record) -> None:
        self._speed.add(record)
        step = record["step"]
        is_last = step >= self._num_steps
        if self._is_terminal:
            self._draw(record)
        elif step == 1 or is_last or step % self._every == 0:
            self._write(f"step {step}/{self._num_steps} · {' · '.join(self._facts(record))}")

    def _facts(self, record: Record) -> list[str]:
        facts = [f"{_count(record.get('consumed_tokens'))} tokens", f"loss {_number(record.get('loss'))}"]
        bits = bits_per_byte(_float(record.get("nelbo_nats_per_token")), self._bytes_per_token)
        if bits is not None:
            facts.append(f"{bits:.3f} bits/byte")
        facts.append(f"grad norm {_number(record.get('grad_norm'))}")
        if self._speed.tokens_per_second is not None:
            facts.append(f"{_count(round(self._speed.tokens_per_second))} tokens/s")
        if self._speed.data_share is not None:
            facts.append(f"data wait {100 * self._speed.data_share:.1f} %")
        if self._speed.seconds_per_step is not None:
            facts.append(f"ETA {_duration(self._remaining_steps(record) * self._speed.seconds_per_step)}")
        facts.append("no checkpoint yet" if self._last_checkpoint is None else f"checkpoint {self._last_checkpoint}")
        return facts

    def _remaining_steps(self, record: Record) -> float:
        """Steps still to go; where the run's samples are known, in steps as large as the last ones were."""
        samples, consumed = self._speed.samples_per_step, _float(record.get("consumed_samples"))
        if self._num_samples is None or samples is None or consumed is None:
            return float(self._num_steps - record["step"])
        return (self._num_samples - consumed) / samples

    def _draw(self, record: Record) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._display is None:
            self._display = self._start_display()
        step = record["step"]
        now = time.monotonic()
        if now - self._drawn < _REDRAW_S and step < self._num_steps:
            return
        self._drawn = now
        bar = Table.grid(padding=(0, 1))
        bar.add_row(f"step {step}/{self._num_steps}", ProgressBar(self._num_steps, step, width=40))
        self._display.update(Group(bar, Text(" · ".join(self._facts(record)))), refresh=True)

    def _start_display(self) -> Live:
        import rich.console
        import rich.live

        class Terminal(rich.console.Console):
            def on_broken_pipe(self) -> None:
                """Rich would end the process here, and point its stdout elsewhere."""
                raise OSError("the terminal is gone")

        display = rich.live.Live(
            console=Terminal(file=self._stream, force_terminal=True),
            auto_refresh=False,  # no thread of its own
            redirect_stdout=False,
            redirect_stderr=False,
        )
        display.start()
        return display

    def _write(self, line: str) -> None:
        if self._display is not None:
            self._display.console.print(line, markup=False, highlight=False, emoji=False)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _give_up(self, error: Exception) -> None:
        self._is_broken = True
        _log.warning("the console stopped showing progress: %r; the journal goes on", error)


class _Speed:
    """Moving averages over the last steps; the first step of an attempt, which starts everything up, is left out."""

    def __init__(self) -> None:
        self._recent: list[tuple[float, float, float, float]] = []  # seconds, data seconds, tokens, samples
        self._num_seen = 0
        self._arrived: float | None = None

    def add(self, record: Record) -> None:
        """Takes in one step line."""
        now = time.monotonic()
        phases = record.get("seconds")
        phases = phases if isinstance(phases, dict) else {}
        between = None if self._arrived is None else now - self._arrived  # saving and evaluating included
        self._arrived = now
        seconds = sum(value for value in map(_float, phases.values()) if value is not None)
        tokens = (_float(record.get("tokens_per_second")) or 0.0) * seconds
        if self._num_seen == 1:
            self._recent.clear()
        self._num_seen += 1
        samples = _float(record.get("global_batch_size")) or 0.0
        self._recent.append((max(seconds, between or 0.0), _float(phases.get("data")) or 0.0, tokens, samples))
        del self._recent[:-_RATE_STEPS]

    @property
    def seconds_per_step(self) -> float | None:
        """Mean wall time of the last steps."""
        return self._total(0) / len(self._recent) if self._total(0) > 0 else None

    @property
    def data_share(self) -> float | None:
        """Share of the last steps spent waiting for data."""
        return self._total(1) / self._total(0) if self._total(0) > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Eligible tokens per second over the last steps."""
        return self._total(2) / self._total(0) if self._total(0) > 0 and self._total(2) > 0 else None

    @property
    def samples_per_step(self) -> float | None:
        """Mean batch size of the last steps."""
        return self._total(3) / len(self._recent) if self._total(3) > 0 else None

    def _total(self, column: int) -> float:
        return sum(entry[column] for entry in self._recent)


def bits_per_byte(nelbo_nats_per_token: float | None, bytes_per_token: float | None) -> float | None:
    """The bound in bits per byte of text: nats per token / ln 2 / bytes per token; None where one is not known."""
    if nelbo_nats_per_token is None or not bytes_per_token or not math.isfinite(nelbo_nats_per_token):
        return None
    return nelbo_nats_per_token / math.log(2) / bytes_per_token


def event_line(record: Record) -> str | None:
    """A line for a record that is no step, or several; None for those that a person need not see."""
    kind, step = record["kind"], record.get("step")
    if kind == "attempt_started":
        resumed = record.get("resumed_from")
        where = resumed.get("step") if isinstance(resumed, dict) else resumed
        restore = _float(record.get("restore_s"))
        taken = "" if restore is None else f" in {restore:.1f} s"
        return f"attempt {record.get('attempt')} started" + (f", resumed from step {where}{taken}" if resumed else "")
    if kind == "evaluation":
        error = _float(record.get("standard_error"))
        line = f"evaluation at step {step}: {_number(record.get('nelbo_nats_per_token'))} nats/token"
        line += f" (standard error {error:.2g})" if error is not None else ""
        bits = _float(record.get("bits_per_byte"))
        return line + (f", {bits:.3f} bits/byte" if bits is not None else "")
    if kind == "sample_preview":
        return "\n".join(f"preview at step {step}: {line}" for line in _previews(record)) or None
    if kind == "checkpoint_committed":
        stall = _float(record.get("stall_s"))
        waited = "" if stall is None else f", training waited {stall:.2f} s"
        return f"checkpoint of step {step} committed" + _digest(record) + waited
    if kind == "incident":
        return f"incident: {record.get('incident')}: {record.get('problem')}"
    if kind == "attempt_ended":
        reason = record.get("reason")
        return f"attempt ended at step {step} with exit code {record.get('exit_code')}" + (
            f": {reason}" if reason else ""
        )
    if kind == "run_completed":
        return f"run completed at step {step}"
    return None


def _previews(record: Record) -> list[str]:
    """Prompt and text of each sample, quoted; the beginning of the prompt and the end of the text are cut off."""
    samples = record.get("samples")
    pairs = [(sample.get("prompt"), sample.get("text")) for sample in samples] if isinstance(samples, list) else []
    lines = []
    for prompt, text in ((str(prompt or ""), str(text or "")) for prompt, text in pairs):
        before = "..." + prompt[-_PROMPT_CHARACTERS:] if len(prompt) > _PROMPT_CHARACTERS else prompt
        after = text[:_TEXT_CHARACTERS] + "..." if len(text) > _TEXT_CHARACTERS else text
        lines.append(f"{before!r} -> {after!r}" if prompt else repr(after))  # repr leaves nothing a terminal would obey
    return lines


def _digest(record: Record) -> str:
    digest = record.get("digest")
    return f" ({digest[:12]})" if isinstance(digest, str) else ""


def _float(value: Any) -> float | None:
    """A journal's number, those that are not finite included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _number(value: Any) -> str:
    number = _float(value)
    return "-" if number is None else f"{number:.4g}" if abs(number) >= 1000 or abs(number) < 0.01 else f"{number:.4f}"


def _count(value: Any) -> str:
    number = _float(value)
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
