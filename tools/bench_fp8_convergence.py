#!/usr/bin/env python3
"""Effect of FP8 on training: bf16 beside each emulated recipe, on the same text, with several seeds.

Every run trains the same small network on a corpus of the standard library's source and ends with a bound on held-out
text. A seed gives initial weights, masks and order of rows; runs of one seed differ in the number format alone. The gap
of a recipe is its bound minus that of bf16 with the same seed. The spread of bf16 over the seeds is beside it.

A network that has learnt only how frequent each token is answers nothing, so that bound is in the table as well:
take a config, a batch and a number of steps that end well below it.

The JSON file is written after every run, and a call that finds one trains only the runs that are missing in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_support import Report, benchmark_parser
from quickstart_summary import split_tokens, unigram_nats_per_token

from megamask.data.manifest import Manifest
from megamask.tracking.journal.lines import read_journal

ROOT = Path(__file__).parents[1]
ARMS = {
    "bf16": (),
    "tensorwise": ("precision.fp8=tensorwise",),
    "delayed": ("precision.fp8=delayed",),
    "blockwise": ("precision.fp8=blockwise",),
}
EVALUATED_ROWS = 128
SETTINGS = (
    "precision.compute=bf16",
    "tracking.mlflow.enabled=false",
    "layout.data_parallel_size=1",
    "optimizer.learning_rate=3e-3",
    "optimizer.warmup_steps=50",
    "optimizer.min_learning_rate=0",
    "optimizer.decay_steps=0",
    "preview.every_steps=null",
    f"evaluation.rows={EVALUATED_ROWS}",
)


def megamask(*arguments: str) -> None:
    """Run a verb; end this program where it fails."""
    command = [sys.executable, "-m", "megamask_pipelines.cli.main", *arguments]
    done = subprocess.run(command, env=dict(os.environ), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments[:3])} ... ended with {done.returncode}:\n{done.stderr}")


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[Path, str]:
    """A corpus of the standard library's source, or of the given text; return its folder and its id."""
    corpus, text = folder / "corpus", arguments.text
    other = (f"corpus.inputs={json.dumps([text])}", "corpus.licence=null", "corpus.origin=null") if text else ()
    megamask(
        *("prepare", "configs/corpus/python_stdlib.yaml", f"corpus.output_dir={corpus}"),
        *(f"corpus.sequence_length={arguments.sequence_length}", "corpus.tokenizer.vocab_size=512", *other),
    )
    return corpus, hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()


def unigram_bound(corpus: Path) -> float:
    """Nats per held-out token of a model that knows the frequencies of the training text."""
    held_out = split_tokens(corpus, "validation", EVALUATED_ROWS)
    return unigram_nats_per_token(split_tokens(corpus, "train", None), held_out, Manifest.load(corpus).vocab_size)


def train(
    folder: Path, corpus: Path, arm: str, seed: int, config: str, settings: list[str], num_steps: int
) -> dict[str, Any]:
    """Train one run; return its bound and the mean losses of about twenty equal parts of its steps."""
    emulation = ("precision.fp8_kernels=emulate",) if ARMS[arm] else ()
    megamask(
        *("train", config, f"run.name={arm}-{seed}", f"run.output_dir={folder}", f"run.seed={seed}"),
        *(f"data.corpora.main={corpus}", f"data.seed={seed}", f"training.steps={num_steps}"),
        *(f"evaluation.every_steps={num_steps}", f"checkpoint.every_steps={num_steps}"),
        *(*settings, *ARMS[arm], *emulation),
    )
    records = list(read_journal(folder / f"{arm}-{seed}"))
    [bound] = [record["nelbo_nats_per_token"] for record in records if record["kind"] == "evaluation"]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    size = max(1, len(losses) // 20)
    means = [statistics.mean(losses[start : start + size]) for start in range(0, len(losses), size)]
    return {"bound": bound, "mean_losses": means}


def main() -> int:
    """Train all arms and seeds that the JSON file does not hold yet, and compare."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--config", default="configs/run/quickstart.yaml", help="network to train (default quickstart)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (default 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default 3)")
    parser.add_argument("--sequence-length", type=int, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples of a step (default 16)")
    parser.add_argument("--text", help="pattern of text files to train on in place of the standard library's source")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds = 10, 1
    report = Report("bench_fp8_convergence", "FP8 beside bf16: convergence", arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, corpus_id = prepare(folder, arguments)
        settings = [
            *SETTINGS,
            f"training.sequence_length={arguments.sequence_length}",
            f"training.global_batch_size={arguments.batch_size}",
            f"training.micro_batch_size={arguments.batch_size}",
        ]
        conditions = {
            "corpus_id": corpus_id,
            "config": arguments.config,
            "steps": arguments.steps,
            "settings": settings,
        }
        runs = finished_runs(arguments.json, conditions)
        report.keep("conditions", conditions)
        unigram = unigram_bound(corpus)
        report.keep("unigram_nats_per_token", unigram)
        for seed in range(1, arguments.seeds + 1):
            for arm in ARMS:
                run = f"{arm} seed {seed}"
                if run not in runs:
                    runs[run] = train(folder, corpus, arm, seed, arguments.config, settings, arguments.steps)
                report.keep("runs", runs)
                report.save()
                print(json.dumps({"run": run, "bound": runs[run]["bound"]}), flush=True)
    compare(report, arguments, runs, unigram)
    return report.finish()


def finished_runs(path: Path | None, conditions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of an earlier call that was cut short, from the JSON file that it left."""
    if path is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["conditions"] != conditions:
        sys.exit(f"{path} holds runs of another corpus, length or settings; name another file. Nothing was trained.")
    runs: dict[str, dict[str, Any]] = earlier["runs"]
    return runs


def compare(report: Report, arguments: argparse.Namespace, runs: dict[str, dict[str, Any]], unigram: float) -> None:
    """One row for each arm."""
    seeds = range(1, arguments.seeds + 1)
    table = report.table(
        f"Bound on held-out text after {arguments.steps:,} steps, nats per token",
        [
            *("number format", "mean of the seeds", "standard deviation of the seeds", "gap to bf16, each seed"),
            *("mean gap", "training loss, first and last part"),
        ],
        "A gap is that of one seed: same first weights, text and masks; positive is worse than bf16. Rounding alone "
        "makes two runs of one seed part, so gaps within the deviation of the seeds show no difference. The training "
        "loss is the mean over a twentieth of the steps and over the seeds. The frequencies of the tokens alone give a "
        f"bound of {unigram:.4f}. Where a network is at most 128 channels wide, a blockwise tile holds complete rows.",
    )
    for arm in ARMS:
        bounds = [runs[f"{arm} seed {seed}"]["bound"] for seed in seeds]
        gaps = [runs[f"{arm} seed {seed}"]["bound"] - runs[f"bf16 seed {seed}"]["bound"] for seed in seeds]
        deviation = statistics.stdev(bounds) if len(bounds) > 1 else float("nan")
        losses = [runs[f"{arm} seed {seed}"]["mean_losses"] for seed in seeds]
        first, last = (statistics.mean(means[place] for means in losses) for place in (0, -1))
        table.add(
            arm,
            f"{statistics.mean(bounds):.4f}",
            f"{deviation:.4f}",
            ", ".join(f"{gap:+.4f}" for gap in gaps),
            f"{statistics.mean(gaps):+.4f}",
            f"{first:.4f}, {last:.4f}",
        )


if __name__ == "__main__":
    raise SystemExit(main())
