"""The past of a mixture where the config of the attempt before is damaged: the journal's counts decide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.layout import config_path
from megamask.tracking.journal.writer import Journal
from megamask.training.mixing import refuse_moved_past
from megamask.training.progress import Progress

STEP, SAMPLES = 3, 24


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose first attempt left a config that is not YAML."""
    path = config_path(tmp_path, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"[")
    return tmp_path


def journal_step(run_dir: Path, **fields: Any) -> None:
    journal = Journal.open(run_dir, 1, rotate_bytes=1 << 20)
    journal.append("step", step=STEP, **fields)
    journal.close()


def resume(run_dir: Path, **consumed: int) -> None:
    """Resume after step 3 with a mixture that gives each corpus so many of the samples before."""
    loader = cast("Loader", SimpleNamespace(sources=dict.fromkeys(consumed), consumed=lambda _: consumed))
    progress = cast("Progress", SimpleNamespace(step=STEP, consumed_samples=SAMPLES))
    refuse_moved_past(cast("TrainConfig", None), run_dir, 2, progress, loader)


@pytest.mark.promise(
    "with a damaged config of the attempt before, the journal decides whether a mixture moves the past"
)
def test_mixture_with_the_journalled_counts_is_resumed_without_the_config(run_dir: Path) -> None:
    journal_step(run_dir, consumed_by_source={"a": 16, "b": 8})
    resume(run_dir, a=16, b=8)
    resume(run_dir, a=16, b=8, c=0)


@pytest.mark.promise(
    "with a damaged config of the attempt before, the journal decides whether a mixture moves the past"
)
@pytest.mark.parametrize(("a", "b"), [(8, 16), (24, 0)])
def test_mixture_with_other_counts_is_refused_without_the_config(run_dir: Path, a: int, b: int) -> None:
    journal_step(run_dir, consumed_by_source={"a": 16, "b": 8})
    with pytest.raises(UsageError, match=r"the run has read .* The past of a run does not move"):
        resume(run_dir, a=a, b=b)


def test_corpus_that_is_added_to_a_run_on_one_has_no_past(run_dir: Path) -> None:
    journal_step(run_dir)
    resume(run_dir, a=SAMPLES, b=0)
    with pytest.raises(UsageError, match="does not move"):
        resume(run_dir, a=16, b=8)


def test_run_on_one_corpus_needs_neither_config_nor_journal(run_dir: Path) -> None:
    resume(run_dir, a=SAMPLES)


def test_mixture_of_which_nothing_tells_is_refused(run_dir: Path) -> None:
    with pytest.raises(CheckpointIntegrityError, match=r"attempt-0001\.yaml is damaged and the journal has no line"):
        resume(run_dir, a=16, b=8)
