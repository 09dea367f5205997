"""The section `run` of bench_train.py: what full runs of `megamask train` wait for, read from their journals."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_support import Report, alternate, ratio, spread

from megamask.tracking.journal.lines import read_journal

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "model.num_layers": 6,
    "model.hidden_size": 384,
    "model.ffn_hidden_size": 1152,
    "model.num_attention_heads": 6,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 4,
    "training.sequence_length": 128,
    "checkpoint.every_steps": 8,
    "evaluation.every_steps": "null",
    "preview.every_steps": "null",
    "layout.data_parallel_size": 1,
}
NUM_STEPS = 24


def measure_runs(report: Report, *, blocks: int, is_quick: bool) -> None:
    """Adds the tables: a step's waits, and the stall of a checkpoint with and without asynchronous saving."""
    settings = SETTINGS | ({"model.num_layers": 2, "model.hidden_size": 96} if is_quick else {})
    found: dict[str, list[list[dict[str, Any]]]] = {"asynchronous": [], "blocking": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        _megamask(
            *("prepare", "configs/corpus/python_stdlib.yaml", f"corpus.output_dir={corpus}"),
            f"corpus.inputs=[{ROOT}/platform/megamask/*/*.py]",
        )

        def run(kind: str) -> Callable[[], None]:
            def train() -> None:
                number = len(found[kind])
                run_name = f"{kind}-{number}"
                _megamask(
                    *("train", "configs/run/quickstart.yaml", f"run.name={run_name}", f"run.output_dir={folder}"),
                    *(f"data.corpora.main={corpus}", f"training.steps={NUM_STEPS}", "tracking.mlflow.enabled=false"),
                    *(f"{key}={value}" for key, value in settings.items()),
                    f"checkpoint.asynchronous={str(kind == 'asynchronous').lower()}",
                )
                found[kind].append(list(read_journal(folder / run_name)))

            return train

        # warm-up runs would be full runs: the first steps of each are left out instead
        alternate({kind: run(kind) for kind in found}, blocks=blocks, warmup=0)
    _report_waits(report, found["blocking"])
    _report_stalls(report, found)


def _megamask(*arguments: str) -> None:
    command = [sys.executable, "-m", "megamask_pipelines.cli.main", *arguments]
    done = subprocess.run(command, env=dict(os.environ), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments[:3])} ... ended with {done.returncode}:\n{done.stderr}")


def _report_waits(report: Report, runs: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Of steps without a checkpoint before them; the seconds of a step are those of the journal."""
    taken: dict[str, list[float]] = {}
    for records in runs:
        for record in records:
            if (
                record["kind"] == "step"
                and record["step"] > 2
                and record["step"] % SETTINGS["checkpoint.every_steps"] != 1
            ):
                for phase, seconds in record["seconds"].items():
                    taken.setdefault(phase, []).append(seconds)
    totals = [sum(values) for values in zip(*taken.values(), strict=True)]
    table = report.table(
        "Where a step's time goes",
        ["phase", "ms a step", "share of the step"],
        "`data` is the wait for rows that were read ahead. `other` holds the journal's line (tools/bench_journal.py "
        "measures it alone), status.json, the console and the agreement to go on.",
    )
    for phase, seconds in taken.items():
        table.add(phase, spread(seconds, scale=1e3), ratio(seconds, totals))
    report.keep("step_seconds", taken)


def _report_stalls(report: Report, found: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    table = report.table(
        "A checkpoint's stall",
        ["saving", "stall, ms", "begin to visible, ms", "stall to blocking", "a step, ms"],
        "The stall is what training waits for. Each number is a run's median over its checkpoints but the last.",
    )
    medians: dict[str, dict[str, list[float]]] = {}
    for kind, runs in found.items():
        medians[kind] = {"stall_s": [], "save_s": []}
        for records in runs:
            commits = [record for record in records if record["kind"] == "checkpoint_committed"][:-1]
            for field, values in medians[kind].items():
                values.append(statistics.median(commit[field] for commit in commits))
    for kind, fields in medians.items():
        step = [
            sum(record["seconds"].values())
            for records in found[kind]
            for record in records
            if record["kind"] == "step" and record["step"] > 2
        ]
        table.add(
            kind,
            spread(fields["stall_s"], scale=1e3),
            spread(fields["save_s"], scale=1e3),
            ratio(fields["stall_s"], medians["blocking"]["stall_s"]),
            spread(step, scale=1e3),
        )
    report.keep("checkpoints", medians)
