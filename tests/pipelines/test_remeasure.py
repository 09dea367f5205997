"""`megamask verify run --evaluate`: the bound of the newest checkpoint, measured again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamask.audit.report import Report
from megamask.provenance.record import code_version, library_versions
from megamask.resilience.process_facts import node_name
from megamask.tracking.records import AttemptStarted
from megamask_pipelines.remeasure import compare, differences
from support.command import checkpoints, megamask, tiny
from support.tiny_run import write_corpus, write_run

PROMISE = pytest.mark.promise("`megamask verify run --evaluate` repeats the newest bound exactly on the same machine")
SLOW = (pytest.mark.slow, pytest.mark.timeout(900))
STEPS = ("training.steps=3", "optimizer.warmup_steps=1", "evaluation.every_steps=3", "evaluation.rows=3")


def train(corpus: Path, folder: Path, *overrides: str) -> Path:
    done = megamask("train", *tiny(corpus, folder, "measured", *STEPS, *overrides))
    assert done.code == 0, done.stderr
    return folder / "measured"


@pytest.mark.multiprocess
@PROMISE
@pytest.mark.parametrize(
    "layout",
    [
        (),
        pytest.param(("layout.data_parallel_size=2",), marks=SLOW),
        pytest.param(("layout.tensor_parallel_size=2", "precision.compute=bf16"), marks=SLOW),
    ],
)
def test_bound_is_measured_again_to_the_bit(
    small_corpus: Path, tmp_path: Path, layout: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train(small_corpus, tmp_path, *layout)
    monkeypatch.chdir("/")
    done = megamask("verify", "run", run_dir, "--evaluate", "--json")
    assert done.code == 0, done.stdout
    name = checkpoints(run_dir)[-1].name
    assert f"the bound of {name}, measured again and compared exactly" in done.json["covered"]


STARTED = AttemptStarted(
    attempt=1,
    host=node_name(),
    device="cpu",
    code_version=code_version(),
    libraries=dict(library_versions()),
    num_threads=1,
)


@PROMISE
def test_what_differs_from_where_the_bound_was_recorded_is_named() -> None:
    assert differences(STARTED, device="cpu") == []
    assert differences(STARTED, device="cuda") == ["device"]
    assert differences(replace(STARTED, host="elsewhere"), device="cpu") == ["host"]
    changes: dict[str, Any] = {"code_version": "0" * 12, "libraries": {"torch": "1.0"}, "num_threads": None}
    assert differences(replace(STARTED, **changes), device="cpu") == [
        "code",
        "libraries",
        "number of threads, which is not recorded",
    ]
    assert differences(None, device="cpu") == ["machine, which is not recorded"]


@pytest.mark.parametrize(
    ("other", "measured", "is_same"),
    [([], 5.0, True), ([], math.nextafter(5.0, 9), False), (["host"], 5.0001, True), (["host"], 5.01, False)],
)
def test_bound_of_another_machine_is_compared_to_the_rounding_of_sums(
    tmp_path: Path, other: list[str], measured: float, is_same: bool
) -> None:
    corpus = write_corpus(tmp_path / "data")
    _, commit = write_run(tmp_path, corpus)
    report = Report()
    compare(replace(commit, evaluation={"nelbo_nats_per_token": "5.0"}), measured, "fp32", other, report)
    assert (report.findings == []) is is_same
    [covered] = report.covered
    assert covered.endswith("compared exactly") is (other == [])
    assert ("another host" in covered) is (other != [])
