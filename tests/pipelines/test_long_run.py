"""A run of many tiny steps stays as it began: memory, threads, descriptors, files and speed."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from megamask.data.manifest import Manifest
from megamask.tracking.journal.chain import verify_chain
from megamask.tracking.journal.lines import journal_files
from megamask.tracking.journal.seek import find_step
from support.command import checkpoints, journal, tiny
from support.process_watch import Sample, between, train_watched
from support.tiny_run import write_corpus

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc"),
]

LENGTH = 16
SMALLEST = (
    f"training.sequence_length={LENGTH}",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_attention_heads=1",
    "model.num_query_groups=1",
    "model.ffn_hidden_size=16",
    "training.global_batch_size=1",
    "training.micro_batch_size=1",
    "checkpoint.keep_last=2",
    "evaluation.rows=2",
    "tracking.console_every_steps=1000",
)
# The exact set depends on neither the number of steps nor of commits; parts of a commit under way come and go.
FILES_OF_A_RUN = {"run.json", "status.json", "config/attempt-0001.yaml", "attempts/0001/claim.json"}
FILES_OF_A_CHECKPOINT = 12
LEEWAY = 12  # a commit's or a database's own threads and descriptors come and go


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 16 tokens, passed over many times in 20,000 steps."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), sequence_length=LENGTH)


def names(run_dir: Path) -> set[str]:
    return {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}


def most(samples: list[Sample], what: str) -> int:
    return max(getattr(sample, what) for sample in samples)


def check_bounded(samples: list[Sample], first: int, last: int) -> None:
    """A process holds in the last third of a run as much as in the first: one leak a commit would show."""
    third = (last - first) // 3
    early, late = between(samples, first, first + third), between(samples, last - third, last)
    assert early, "no sample was taken in the first third"
    assert late, "no sample was taken in the last third"
    for what in ("num_threads", "num_descriptors"):
        assert most(late, what) <= most(early, what) + LEEWAY, what
    assert most(late, "num_files") <= most(early, "num_files") + FILES_OF_A_CHECKPOINT


@pytest.mark.promise("threads, descriptors and files of a run stay bounded")
def test_files_threads_and_descriptors_of_a_run_stay_bounded(corpus: Path, tmp_path: Path) -> None:
    """300 steps, 30 commits and 30 evaluations: all that each of them left behind would be more than the leeway."""
    every = ("checkpoint.every_steps=10", "evaluation.every_steps=10", "training.steps=300")
    run_dir = tmp_path / "run"
    code, samples = train_watched(
        tiny(corpus, tmp_path, "run", *SMALLEST, *every), run_dir, tmp_path / "log", every_s=0.02, timeout_s=240
    )
    assert code == 0, (tmp_path / "log").read_text()
    check_bounded(samples, 10, 300)
    kept = checkpoints(run_dir)
    assert [folder.name for folder in kept] == ["step-00000290-a0001", "step-00000300-a0001"]
    outside = {name for name in names(run_dir) if not name.startswith("checkpoints/step-")}
    assert outside == FILES_OF_A_RUN | {"checkpoints/latest", "journal/attempt-0001-000.jsonl"}
    inside = {name.split("/")[1] for name in names(run_dir) - outside}
    assert inside == {folder.name for folder in kept}
    assert verify_chain(run_dir) == []


@pytest.mark.promise(
    "20,000 steps with MLflow, evaluation and commits: memory flat, journal rotated and chained, every step in "
    "MLflow once"
)
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_run_of_20000_steps_ends_as_it_began(corpus: Path, tmp_path: Path) -> None:
    """Memory grows by less than 32 MiB after the first 2,000 steps, with MLflow, evaluation and commits all along."""
    steps = 20_000
    options = (
        f"training.steps={steps}",
        "checkpoint.every_steps=500",
        "evaluation.every_steps=500",
        "tracking.journal_file_mib=1",
        "tracking.mlflow.enabled=true",
        "tracking.mlflow.drain_timeout_s=600",
    )
    run_dir = tmp_path / "run"
    code, samples = train_watched(
        tiny(corpus, tmp_path, "run", *SMALLEST, *options), run_dir, tmp_path / "log", every_s=0.25, timeout_s=2000
    )
    assert code == 0, (tmp_path / "log").read_text()
    show(samples, journal(run_dir), steps)
    check_bounded([sample for sample in samples if sample.step < steps], 2000, steps - 1)
    settled, end = between(samples, 2000, 4000), between(samples, steps - 2000, steps)
    grown = statistics.median(s.resident_kib for s in end) - statistics.median(s.resident_kib for s in settled)
    assert grown < 32 * 1024
    assert len(journal_files(run_dir)) >= 10
    assert all(file.path.stat().st_size <= 2**20 for file in journal_files(run_dir))
    assert verify_chain(run_dir) == []
    assert len(checkpoints(run_dir)) == 2
    for step in (1, 12_345, steps):
        found = find_step(run_dir, step)
        assert found is not None
        assert found["consumed_samples"] == step
    assert steps > 5 * Manifest.load(corpus).split("train").num_rows, "the run passes over its corpus many times"
    check_mlflow(tmp_path, steps)


def check_mlflow(runs: Path, steps: int) -> None:
    """Every step reached the store, once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == "megamask"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss_nats_per_token")] == list(
        range(1, steps + 1)
    )


def show(samples: list[Sample], records: list[dict[str, object]], steps: int) -> None:
    """Prints what a person wants to see of the run, a row for each tenth of it."""
    seconds = {
        record["step"]: sum(record["seconds"].values())  # type: ignore[attr-defined]
        for record in records
        if record["kind"] == "step"
    }
    rows = ["", "| steps | milliseconds a step, median | resident MiB | threads | descriptors | files |"]
    rows.append("|---|---|---|---|---|---|")
    tenth = steps // 10
    for first in range(1, steps, tenth):
        seen = between(samples, first, first + tenth - 1)
        median = 1e3 * statistics.median(seconds[step] for step in range(first, first + tenth))
        memory = statistics.median(sample.resident_kib for sample in seen) / 1024 if seen else float("nan")
        counts = [most(seen, what) for what in ("num_threads", "num_descriptors", "num_files")] if seen else []
        cells = [f"{first} to {first + tenth - 1}", f"{median:.2f}", f"{memory:.1f}", *map(str, counts)]
        rows.append(f"| {' | '.join(cells)} |")
    first, last = (
        statistics.median(seconds[step] for step in span)
        for span in (range(tenth // 2, tenth), range(steps - tenth // 2, steps))
    )
    rows.append(f"\nlast steps' median beside the first ones': {last / first:.3f}")
    sys.stderr.write("\n".join(rows) + "\n")
