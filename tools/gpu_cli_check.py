#!/usr/bin/env python3
"""A run through the command line here: prepare, train, stop by a signal, resume; bf16, and FP8 where it runs.

    gpu_cli_check.py FOLDER [--rehearse]

The resumed run must be the one that was never stopped: losses and gradient norms of every step are equal, bit for bit.
Ends with 77 where a package is missing that `megamask train` needs. --rehearse takes few steps of a tiny network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEEDED = ("omegaconf", "crc32c", "webdataset", "tokenizers", "tiktoken", "pyarrow", "rich")
COMMON = (
    *("tracking.mlflow.enabled=false", "training.sequence_length=64", "precision.compute=bf16"),
    *("training.global_batch_size=8", "training.micro_batch_size=4", "evaluation.every_steps=null"),
)


def command(*arguments: str) -> list[str]:
    """A verb of megamask, by this interpreter."""
    return [sys.executable, "-m", "megamask_pipelines.cli.main", *arguments]


def call(*arguments: str) -> None:
    """Run a verb; end this program where it fails."""
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments[:2])} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def steps_of(run: Path) -> dict[int, Any]:
    """Return the results of each step by its number; a later line of a step replaces an earlier one."""
    from megamask.tracking.journal.lines import read_journal

    if not run.is_dir():
        return {}
    records = [record for record in read_journal(run) if record["kind"] == "step"]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


def stop_midway(arguments: list[str], run: Path, *, after_step: int) -> int:
    """Start training, send SIGTERM once a step is journalled, and return the exit code."""
    with subprocess.Popen(command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None and max(steps_of(run), default=0) < after_step:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        return job.wait()


def check(folder: Path, name: str, settings: tuple[str, ...], num_steps: int) -> dict[str, Any]:
    """Train through, and with a stop; compare every step."""

    def arguments(run: str) -> list[str]:
        return [
            *("train", "configs/run/tiny.yaml", f"run.name={run}", f"run.output_dir={folder}"),
            *(f"data.corpora.main={folder / 'corpus'}", f"training.steps={num_steps}", *COMMON, *settings),
            f"checkpoint.every_steps={num_steps}",
        ]

    call(*arguments(f"{name}-through"))
    code = stop_midway(arguments(f"{name}-stopped"), folder / f"{name}-stopped", after_step=num_steps // 4)
    call(*arguments(f"{name}-stopped"))
    through, stopped = (steps_of(folder / f"{name}-{kind}") for kind in ("through", "stopped"))
    last = through[num_steps][0]
    return {"exit_code_of_the_stop": code, "is_equal": through == stopped, "last_loss": last, "steps": len(through)}


def main() -> int:
    """Check bf16 and FP8; write cli.json."""
    folder, is_rehearsal = Path(sys.argv[1]), "--rehearse" in sys.argv
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"megamask train needs packages that are not installed here: {', '.join(missing)}")
        return 77
    from megamask.engine.probes import capability

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    call(
        *("prepare", "configs/corpus/python_stdlib.yaml", f"corpus.output_dir={folder / 'corpus'}"),
        *(f"corpus.inputs=[{ROOT}/platform/megamask/engine/*.py]", "corpus.sequence_length=64"),
        "corpus.tokenizer.vocab_size=300",
    )
    kinds = {"bf16": ()} | ({"tensorwise": ("precision.fp8=tensorwise",)} if capability().can_run_te else {})
    found = {name: check(folder, name, settings, 40 if is_rehearsal else 200) for name, settings in kinds.items()}
    (folder / "cli.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0 if all(each["is_equal"] for each in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
