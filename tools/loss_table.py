#!/usr/bin/env python3
"""Reference curves of a run as a Markdown table: loss, bound and cross entropy by noise level, in spans of steps.

    megamask train configs/run/tiny.yaml training.steps=400 evaluation.every_steps=50
    python tools/loss_table.py runs/tiny --spans 1-50,51-100,201-250,351-400

A span's cross entropy at a noise level is the mean over its masked tokens; its bound is that of the last evaluation in
it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEVELS = ((0, 1), (1, 3), (3, 5), (5, 7), (7, 9), (9, 10))
"""Tenths of the mask probability that a column joins: from, up to."""


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The journal, in order."""
    files = sorted((run_dir / "journal").glob("attempt-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def table(lines: Sequence[dict[str, Any]], spans: Sequence[tuple[int, int]]) -> str:
    """The table.

    Args:
        lines: records of a journal.
        spans: (first step, last step) of each row.
    """
    head = ["steps", "loss", "bound", *(f"{first / 10:.1f} to {stop / 10:.1f}" for first, stop in LEVELS)]
    rows = [head, ["---"] * len(head)]
    for first, last in spans:
        inside = [line for line in lines if line.get("step") is not None and first <= line["step"] <= last]
        steps = [line for line in inside if line["kind"] == "step"]
        bounds = [line["nelbo_nats_per_token"] for line in inside if line["kind"] == "evaluation"]
        loss = sum(line["loss"] for line in steps) / len(steps) if steps else None
        cells = [
            _cell(loss),
            _cell(bounds[-1] if bounds else None),
            *(_cell(_level(steps, *level)) for level in LEVELS),
        ]
        rows.append([f"{first} to {last}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _level(steps: Sequence[dict[str, Any]], first: int, stop: int) -> float | None:
    """Mean cross entropy of the masked tokens of some noise levels."""
    total, count = 0.0, 0
    for step in steps:
        for entropy, number in zip(
            step["loss_by_noise_level"][first:stop], step["masked_tokens_by_noise_level"][first:stop], strict=True
        ):
            if number:
                total, count = total + entropy * number, count + number
    return total / count if count else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Print the table of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--spans", required=True, help="spans of steps, as 1-50,351-400")
    arguments = parser.parse_args()
    spans = [(int(first), int(last)) for first, _, last in (text.partition("-") for text in arguments.spans.split(","))]
    print(table(records(arguments.run), spans))


if __name__ == "__main__":
    main()
