"""A run whose batch grows while its learning rate falls by tokens: restarts, layouts, inspect, refused extensions.

Levels of 2, 4, 6 and 8 samples; each of the first three has 8 samples, rounded up: 4, 2 and 2 steps.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from megamask.audit.recompute import inspect_step, open_loader, recorded_run
from support.command import journal, megamask, step_lines, tiny

pytestmark = pytest.mark.multiprocess

SIZES = [2] * 4 + [4] * 2 + [6] * 2 + [8] * 2
LENGTH, WARMUP, PEAK, MINIMUM = 64, 512, 3e-3, 1e-4
RAMPED = (
    f"training.steps={len(SIZES)}",
    "training.micro_batch_size=1",
    "training.batch_size_ramp_start=2",
    "training.batch_size_ramp_increment=2",
    "training.batch_size_ramp_samples=24",
    "optimizer.lr_schedule=cosine",
    "optimizer.schedule_unit=tokens",
    "optimizer.warmup_steps=0",
    f"optimizer.warmup_tokens={WARMUP}",
    f"optimizer.min_learning_rate={MINIMUM}",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ramped(runs: Path, small_corpus: Path) -> Path:
    """The run, without interruption on one process."""
    done = megamask("train", *tiny(small_corpus, runs, "ramped", *RAMPED), "--json")
    assert done.code == 0, done.stderr
    return runs / "ramped"


@pytest.mark.promise("a growing batch uses every sample index once, in order")
def test_steps_of_a_ramp_use_every_sample_index_once_in_order(ramped: Path) -> None:
    steps = step_lines(ramped)
    assert [steps[step]["global_batch_size"] for step in sorted(steps)] == SIZES
    first = 0
    for step, size in enumerate(SIZES, start=1):
        indices = np.arange(first, first + size, dtype="<i8")
        assert steps[step]["batch_digest"] == hashlib.sha256(indices.tobytes()).hexdigest()[:16]
        assert steps[step]["consumed_samples"] == first + size
        first += size


@pytest.mark.promise("the journal's learning rate is the schedule's")
def test_learning_rate_of_the_journal_is_the_cosine_of_the_tokens(ramped: Path) -> None:
    """Warm-up ends after 8 samples, that is after step 4; the last step has the minimum."""
    tokens = [LENGTH * sum(SIZES[:step]) for step in range(1, len(SIZES) + 1)]
    expected = [
        PEAK * x / WARMUP
        if x <= WARMUP
        else MINIMUM + (PEAK - MINIMUM) * math.cos(math.pi / 2 * (x - WARMUP) / (tokens[-1] - WARMUP)) ** 2
        for x in tokens
    ]
    assert [line["learning_rate"] for line in step_lines(ramped).values()] == pytest.approx(expected, rel=1e-12)


@pytest.mark.promise("a run stopped within a ramp continues bit for bit")
def test_run_stopped_within_a_level_of_the_ramp_continues_bit_for_bit(
    ramped: Path, runs: Path, small_corpus: Path
) -> None:
    arguments = tiny(small_corpus, runs, "stopped", *RAMPED)
    done = megamask("train", *arguments, "training.stop_after_step=5", "--json")
    assert (done.code, done.json["step"]) == (0, 5), done.stderr
    assert megamask("train", *arguments).code == 0
    assert step_lines(runs / "stopped") == step_lines(ramped)


@pytest.mark.promise("a ramp on two data-parallel ranks equals one process")
def test_ramp_on_two_data_parallel_ranks_equals_one_process(ramped: Path, runs: Path, small_corpus: Path) -> None:
    """Losses as far apart as the order of float32 sums makes them (tests/parallel/test_training_layouts.py)."""
    done = megamask("train", *tiny(small_corpus, runs, "data2", *RAMPED, "layout.data_parallel_size=2"))
    assert done.code == 0, done.stderr
    lines = step_lines(runs / "data2")
    assert sorted(lines) == list(range(1, len(SIZES) + 1))
    for step, expected in step_lines(ramped).items():
        exact = ("global_batch_size", "learning_rate", "masked_tokens", "batch_digest", "content_digest")
        assert {key: lines[step][key] for key in exact} == {key: expected[key] for key in exact}, step
        assert lines[step]["loss"] == pytest.approx(expected["loss"], rel=2e-6), step
    attempts = [next(r for r in journal(runs / name) if r["kind"] == "attempt_started") for name in ("ramped", "data2")]
    assert [attempt["num_micro_batches"] for attempt in attempts] == [8, 4]


@pytest.mark.promise("`megamask inspect` agrees on every step of a ramp")
def test_inspect_agrees_with_the_journal_on_every_step_of_the_ramp(ramped: Path) -> None:
    run = recorded_run(ramped)
    with open_loader(run) as loader:
        for step, size in enumerate(SIZES, start=1):
            report = inspect_step(run, loader, step)  # raises where a digest is another one
            assert report["matches_journal"] is True
            assert [sample["sample_index"] for sample in report["samples"]] == list(
                range(sum(SIZES[: step - 1]), sum(SIZES[: step - 1]) + size)
            )


@pytest.mark.promise("a cosine run can be extended until warm-up ends and never after")
def test_extending_a_cosine_run_past_its_warmup_is_refused_and_names_the_key(
    ramped: Path, runs: Path, small_corpus: Path
) -> None:
    before = sorted(ramped.rglob("*"))
    done = megamask("train", *tiny(small_corpus, runs, "ramped", *RAMPED, "training.steps=12"), "--json")
    assert done.code == 2
    assert "optimizer.lr_schedule is cosine" in done.stderr
    assert "learning rate of steps 5 to 10" in done.stderr
    assert sorted(ramped.rglob("*")) == before
