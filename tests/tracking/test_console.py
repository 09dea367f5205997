from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megamask.config.schema.tracking import MLflowConfig, TrackingConfig
from megamask.tracking import console as console_module
from megamask.tracking.console import Console, bits_per_byte, event_line


def console(stream: Any, *, steps: int = 100, every: int = 10, **options: Any) -> Console:
    config = SimpleNamespace(
        training=SimpleNamespace(steps=steps),
        tracking=TrackingConfig(console_every_steps=every, mlflow=MLflowConfig()),
    )
    return Console(config, stream=stream, **options)  # type: ignore[arg-type]


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "loss": 5.25,
        "nelbo_nats_per_token": 5.25,
        "grad_norm": 1.5,
        "consumed_tokens": 1000 * step,
        "tokens_per_second": 2000.0,
        "seconds": {"data": 0.05, "forward_backward": 0.4, "optimizer": 0.05, "other": 0.0},
        **changes,
    }


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between records, so that only the recorded seconds count."""
    monkeypatch.setattr(console_module.time, "monotonic", lambda: 5.0)


def test_plain_line_shows_every_figure(frozen_clock: None) -> None:
    stream = io.StringIO()
    shown = console(stream, bytes_per_token=2.5)
    shown.on_record({"kind": "checkpoint_committed", "step": 5, "digest": "abcdef0123456789"})
    shown.on_record(step_record(10))
    assert stream.getvalue() == (
        "checkpoint of step 5 committed (abcdef012345)\n"
        "step 10/100 · 10k tokens · loss 5.2500 · 3.030 bits/byte · grad norm 1.5000 · 2000 tokens/s · "
        "data wait 10.0 % · ETA 0:45 · checkpoint 5\n"
    )


def test_plain_lines_come_every_n_steps_and_at_both_ends() -> None:
    stream = io.StringIO()
    shown = console(stream, steps=25)
    for step in range(1, 26):
        shown.on_record(step_record(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/25", "10/25", "20/25", "25/25"]


def test_speed_leaves_the_first_step_of_an_attempt_out(frozen_clock: None) -> None:
    stream = io.StringIO()
    shown = console(stream, every=1)
    shown.on_record(step_record(1, seconds={"forward_backward": 50.0}, tokens_per_second=20.0))
    shown.on_record(step_record(2))
    first, second = stream.getvalue().splitlines()
    assert "ETA 1:22:30" in first
    assert "ETA 0:49" in second
    assert "2000 tokens/s" in second


@pytest.mark.promise("the remaining time counts the samples of a growing batch")
def test_eta_counts_the_samples_of_a_growing_batch(frozen_clock: None) -> None:
    """Half a second for steps of 4 samples; the 76 samples that are left take 19 such steps, not 8."""
    stream = io.StringIO()
    shown = console(stream, steps=10, every=1, num_samples=84)
    for step in (1, 2):
        shown.on_record(step_record(step, global_batch_size=4, consumed_samples=4 * step))
    assert "ETA 0:10" in stream.getvalue().splitlines()[-1]  # 9.5 s


def test_eta_counts_the_time_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving and evaluating are between two step records; they take time as well."""
    times = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(times))
    stream = io.StringIO()
    shown = console(stream, every=1)
    for step in (1, 2, 3):
        shown.on_record(step_record(step))
    assert "ETA 3:14" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": "nan", "grad_norm": "inf"}, "loss nan · grad norm inf"),
        ({"loss": None, "consumed_tokens": None}, "- tokens · loss -"),
        ({"seconds": None, "tokens_per_second": None}, "grad norm 1.5000 · no checkpoint yet"),
        ({"grad_norm": 12345.0, "consumed_tokens": 2_500_000_000}, "2.5G tokens · loss 5.2500 · grad norm 1.234e+04"),
    ],
)
def test_strange_numbers_are_shown_as_they_are(frozen_clock: None, changes: dict[str, Any], expected: str) -> None:
    stream = io.StringIO()
    console(stream, every=1).on_record(step_record(1, **changes))
    assert expected in stream.getvalue()


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"kind": "attempt_started", "attempt": 1, "resumed_from": None}, "attempt 1 started"),
        (
            {"kind": "attempt_started", "attempt": 2, "resumed_from": {"step": 7}},
            "attempt 2 started, resumed from step 7",
        ),
        (
            {"kind": "attempt_started", "attempt": 2, "resumed_from": {"step": 7}, "restore_s": 0.449},
            "attempt 2 started, resumed from step 7 in 0.4 s",
        ),
        (
            {"kind": "checkpoint_committed", "step": 7, "digest": "ab" * 32, "stall_s": 0.0349},
            "checkpoint of step 7 committed (abababababab), training waited 0.03 s",
        ),
        (
            {
                "kind": "evaluation",
                "step": 4,
                "nelbo_nats_per_token": 5.1,
                "standard_error": 0.02,
                "bits_per_byte": 2.9,
            },
            "evaluation at step 4: 5.1000 nats/token (standard error 0.02), 2.900 bits/byte",
        ),
        ({"kind": "incident", "incident": "x", "problem": "[bold]y"}, "incident: x: [bold]y"),
        (
            {"kind": "attempt_ended", "step": 4, "exit_code": 75, "reason": "SIGTERM"},
            "attempt ended at step 4 with exit code 75: SIGTERM",
        ),
        ({"kind": "run_completed", "step": 4}, "run completed at step 4"),
        ({"kind": "checkpoint_started", "step": 4}, None),
        ({"kind": "checkpoint_pruned", "step": 4}, None),
    ],
)
def test_event_line(record: dict[str, Any], line: str | None) -> None:
    assert event_line(record) == line


def preview_record(*samples: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "sample_preview", "step": 4, "samples": list(samples)}


def test_preview_is_a_short_line_for_each_sample() -> None:
    record = preview_record(
        {"prompt": "def f():\n", "text": "    return 1\n"},
        {"prompt": "", "text": "h\u00e9"},
        {"prompt": "p" * 40, "text": "t" * 500},
    )
    assert event_line(record) == (
        "preview at step 4: 'def f():\\n' -> '    return 1\\n'\n"
        "preview at step 4: 'h\u00e9'\n"
        f"preview at step 4: '...{'p' * 30}' -> '{'t' * 100}...'"
    )
    assert event_line(preview_record()) is None


@pytest.mark.promise("a terminal executes no control sequence contained in a preview")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_terminal_obeys_nothing_in_a_preview(is_terminal: bool) -> None:
    """Escape sequences, 8-bit controls, carriage returns, reversed writing, line separators,
    rich's markup and emoji.
    """
    stream = io.StringIO()
    shown = console(stream, steps=3, is_terminal=is_terminal)
    shown.on_record(step_record(1))
    written = len(stream.getvalue())
    text = "\x1b]0;title\x07\x1b[31m\x9b2J\r\x08\u202e\u2028[bold]:smile:[/bold]"
    shown.on_record(preview_record({"prompt": "\x1b[2J", "text": text}))
    shown.close()
    drawn = stream.getvalue()[written:]
    assert r"'\x1b[2J' ->" in drawn
    assert r"'\x1b]0;title\x07\x1b[31m\x9b2J\r\x08\u202e\u2028[bold]:smile:[/bold]'" in drawn
    assert not set("\x07\x08\x9b\u202e\u2028") & set(drawn)
    assert "\x1b[31m" not in drawn and "\x1b]0" not in drawn


def test_terminal_draws_a_display_and_keeps_events() -> None:
    stream = io.StringIO()
    shown = console(stream, steps=3, is_terminal=True)
    for step in range(1, 4):
        shown.on_record(step_record(step))
    shown.on_record({"kind": "incident", "incident": "x", "problem": "[bold]kept[/bold]"})
    shown.close()
    shown.close()
    drawn = stream.getvalue()
    assert "3/3" in drawn
    assert "data wait 10.0 %" in drawn
    assert "incident: x: [bold]kept[/bold]" in drawn
    assert "\x1b[" in drawn


@pytest.mark.parametrize("is_terminal", [True, False])
def test_console_that_fails_goes_silent_and_never_raises(is_terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError("nobody reads")

    shown = console(Closed(), every=1, is_terminal=is_terminal)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            shown.on_record(step_record(step))
        shown.on_record({"kind": "incident", "incident": "x", "problem": "y"})
        shown.close()
    assert caplog.text.count("the console stopped showing progress") >= 1


def test_line_without_its_fields_is_skipped() -> None:
    stream = io.StringIO()
    shown = console(stream, every=1)
    shown.on_record({"kind": "step"})
    shown.on_record({"kind": "unknown"})
    shown.on_record(step_record(2))
    assert [line.split(" · ")[0] for line in stream.getvalue().splitlines()] == ["step 2/100"]


@pytest.mark.promise("an extension and a change of layout are shown by console, status and MLflow")
def test_attempt_names_what_differs_from_the_attempt_before() -> None:
    line = {
        "kind": "attempt_started",
        "attempt": 2,
        "resumed_from": {"step": 7},
        "extended": {"training.steps": [80, 100]},
        "changed": {"layout.tensor_parallel_size": [1, 2]},
    }
    assert event_line(line) == (
        "attempt 2 started, resumed from step 7; training.steps 80 -> 100; layout.tensor_parallel_size 1 -> 2"
    )


@pytest.mark.promise("a resumed attempt names the checkpoint that it has, in its first step line too")
def test_resumed_attempt_names_the_checkpoint_that_it_has() -> None:
    stream = io.StringIO()
    shown = console(stream, every=1)
    shown.on_record({"kind": "attempt_started", "attempt": 2, "resumed_from": {"step": 7}})
    shown.on_record(step_record(8))
    assert stream.getvalue().rstrip().endswith("checkpoint 7")
    assert "no checkpoint yet" not in stream.getvalue()


def test_bits_per_byte_needs_both_numbers() -> None:
    assert bits_per_byte(2.0 * 0.6931471805599453, 4.0) == pytest.approx(0.5)
    assert bits_per_byte(None, 4.0) is None
    assert bits_per_byte(1.0, None) is None
    assert bits_per_byte(1.0, 0.0) is None
    assert bits_per_byte(float("nan"), 4.0) is None
