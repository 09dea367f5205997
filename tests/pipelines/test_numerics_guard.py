"""Steps at fault: the update is skipped, or the run goes back and leaves samples out, the same after any restart."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.checkpoint.commit import load_commit
from megamask.checkpoint.contents import read_model
from megamask.data.content import batch_digest
from megamask.engine.state.restore import read_canonical_weights, read_num_updates
from megamask.runs.skips import read_rewinds, write_rewinds
from support.command import checkpoints, journal, megamask, step_lines, tiny
from support.faulty_main import start_with_fault

pytestmark = pytest.mark.multiprocess
NAN, SPIKE = float("nan"), 1e4
BAD_STEP, BAD_SAMPLE = 6, 42  # in a batch of 8: samples 40 to 47
REWIND = ("resilience.nonfinite=rewind", "resilience.rewind_steps=3", "checkpoint.every_steps=2")
STEPS = 12


def train(
    corpus: Path,
    runs: Path,
    name: str,
    *overrides: str,
    factor: float = NAN,
    samples: tuple[int, ...] = (BAD_SAMPLE,),
    rank: int | None = None,
    fault: dict[str, Any] | None = None,
) -> tuple[int, str]:
    """Trains a run some of whose samples make gradients that are not finite, or large. Exit code and stderr."""
    arguments = tiny(corpus, runs, name, f"training.steps={STEPS}", *overrides)
    poison = {"samples": samples, "factor": factor, "rank": rank}
    process = start_with_fault(["train", *arguments], {"poison": poison, **(fault or {})})
    _, stderr = process.communicate(timeout=240)
    return process.returncode, stderr


def incidents(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in journal(run_dir) if record["kind"] == "incident" and record["incident"] == name]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_canonical_weights(folder, read_model(folder).spec))


def assert_equal_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def by_step(run_dir: Path) -> dict[int, Path]:
    return {load_commit(folder).step: folder for folder in checkpoints(run_dir)}


@pytest.mark.promise("a skipped update keeps its step number and leaves weights, moments and learning rate alone")
def test_skipped_update_keeps_its_number_and_changes_nothing_else(small_corpus: Path, tmp_path: Path) -> None:
    skip = ("resilience.nonfinite=skip", "checkpoint.every_steps=1", "checkpoint.keep_last=20")
    code, stderr = train(small_corpus, tmp_path, "run", *skip)
    assert code == 0, stderr
    run_dir = tmp_path / "run"
    lines, [incident] = step_lines(run_dir), incidents(run_dir, "update_skipped")
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert [step for step, line in lines.items() if line.get("is_skipped")] == [BAD_STEP]
    assert (incident["step"], incident["sample_indices"]) == (BAD_STEP, list(range(40, 48)))
    assert lines[BAD_STEP]["grad_norm"] == "nan"
    saved = by_step(run_dir)
    assert_equal_weights(saved[BAD_STEP - 1], saved[BAD_STEP])
    assert [read_num_updates(saved[step]) for step in (5, 6, 7)] == [5, 5, 6]
    plain = megamask("train", *tiny(small_corpus, tmp_path, "plain", f"training.steps={STEPS}"))
    assert plain.code == 0
    for name in ("learning_rate", "batch_digest", "content_digest", "masked_tokens", "consumed_tokens"):
        expected = [line[name] for line in step_lines(tmp_path / "plain").values()]
        assert [line[name] for line in lines.values()] == expected
    assert all("is_skipped" not in line for line in step_lines(tmp_path / "plain").values())
    assert megamask("verify", "run", run_dir).code == 0
    # another layout, and a fault on one rank alone, lead to the same decision
    code, stderr = train(small_corpus, tmp_path, "two", *skip[:1], "layout.data_parallel_size=2", rank=1)
    assert code == 0, stderr
    [other] = incidents(tmp_path / "two", "update_skipped")
    assert {key: other[key] for key in ("step", "sample_indices")} == {
        key: incident[key] for key in ("step", "sample_indices")
    }
    text = (run_dir / "journal" / "attempt-0001-000.jsonl").read_text()
    assert '"is_skipped":true' in text


@pytest.mark.promise("a spike is judged by the median of the steps before it, alike after a restart")
def test_spike_is_found_by_the_median_before_it_after_a_restart_as_well(small_corpus: Path, tmp_path: Path) -> None:
    rule = ("resilience.spike=skip", "resilience.spike_window=4")
    code, stderr = train(small_corpus, tmp_path, "run", *rule, "training.stop_after_step=5", factor=SPIKE)
    assert code == 0, stderr
    code, stderr = train(small_corpus, tmp_path, "run", *rule, factor=SPIKE)
    assert code == 0, stderr
    [incident] = incidents(tmp_path / "run", "update_skipped")
    assert (incident["step"], incident["sample_indices"]) == (BAD_STEP, list(range(40, 48)))
    assert "above 10 times" in incident["problem"]
    code, stderr = train(small_corpus, tmp_path, "stopped", "resilience.spike=stop", rule[1], factor=SPIKE)
    assert code == 66
    assert "the gradient norm is" in stderr
    [incident] = incidents(tmp_path / "stopped", "spike")
    assert incident["step"] == BAD_STEP


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A run that was rewound from step 6 to step 3 and left out samples 24 to 47."""
    folder = tmp_path_factory.mktemp("rewound")
    code, stderr = train(small_corpus, folder, "run", *REWIND)
    assert code == 0, stderr
    return folder / "run"


@pytest.mark.promise("after a rewind the run goes on in the same processes and leaves out exactly the recorded samples")
def test_rewind_goes_back_and_leaves_out_the_samples_of_the_steps_before_the_fault(rewound: Path) -> None:
    [rewind] = read_rewinds(rewound)
    assert (rewind.attempt, rewind.step, rewind.back_to_step, rewind.samples) == (1, 6, 3, range(24, 48))
    kinds = [(record["kind"], record.get("step")) for record in journal(rewound)]
    assert kinds.count(("run_completed", STEPS)) == 1
    lines = step_lines(rewound)
    firsts = {1: 0, 2: 8, 3: 16} | {step: 48 + 8 * (step - 4) for step in range(4, STEPS + 1)}
    assert {step: line["batch_digest"] for step, line in lines.items()} == {
        step: batch_digest(first, 8) for step, first in firsts.items()
    }
    assert [line["consumed_samples"] for line in lines.values()] == [8 * step for step in lines]
    [started] = [r for r in journal(rewound) if r["kind"] == "attempt_started" and r["attempt"] == 2]
    assert (started["resumed_from"]["step"], started["skipped_samples"]) == (2, [[24, 48]])
    assert load_commit(checkpoints(rewound)[-1]).laws["order"] == 2
    shown = megamask("inspect", rewound, "--step", 4, "--json").json
    assert [sample["sample_index"] for sample in shown["samples"]] == list(range(48, 56))
    assert shown["matches_journal"] is True
    verified = megamask("verify", "run", rewound, "--data", "--json")
    assert (verified.code, verified.json["findings"]) == (0, [])
    assert "skips.json" in verified.json["covered"]


@pytest.mark.promise("`megamask verify run` finds a skips.json that is not the run's")
def test_forged_or_lost_document_is_found(rewound: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(rewound, run_dir)
    [rewind] = read_rewinds(run_dir)
    run_id = json.loads((run_dir / "skips.json").read_text())["run_id"]
    forged = [rewind.__class__(**{**vars(rewind), "end_sample": 40})]
    write_rewinds(run_dir, run_id, forged)
    found = megamask("verify", "run", run_dir, "--json")
    assert found.code == 65
    assert any("batch_digest" in finding["problem"] for finding in found.json["findings"])
    (run_dir / "skips.json").unlink()
    found = megamask("verify", "run", run_dir, "--json")
    assert found.code == 65
    assert any("skipped_samples" in finding["problem"] for finding in found.json["findings"])
    # training does not go on under another order either
    (run_dir / "status.json").unlink()
    resumed = megamask("train", *tiny(small_corpus_of(run_dir), tmp_path, "run", "training.steps=14"))
    assert resumed.code == 65
    assert "1 rewinds" in resumed.stderr


def small_corpus_of(run_dir: Path) -> Path:
    [line] = [r for r in (run_dir / "config" / "attempt-0001.yaml").read_text().splitlines() if "main:" in r]
    return Path(line.partition("main:")[2].strip().strip("'\""))


@pytest.mark.promise("a run killed in the middle of a rewind ends bit-identical to one that was not")
@pytest.mark.parametrize(
    "point",
    [
        "rewind.written",
        pytest.param("rewind.planned", marks=pytest.mark.slow),
        pytest.param("rewind.checkpoint_removed", marks=pytest.mark.slow),
        pytest.param("skips.json.replaced", marks=pytest.mark.slow),
    ],
)
def test_run_killed_in_the_middle_of_a_rewind_ends_as_the_uninterrupted_one(
    point: str, rewound: Path, small_corpus: Path, tmp_path: Path
) -> None:
    fault = {"point": point, "nth": 1, "rank": None, "action": "kill", "folder": str(tmp_path)}
    code, stderr = train(small_corpus, tmp_path, "run", *REWIND, fault=fault)
    assert code == -signal.SIGKILL, stderr
    code, stderr = train(small_corpus, tmp_path, "run", *REWIND)
    assert code == 0, stderr
    assert step_lines(tmp_path / "run") == step_lines(rewound)
    assert_equal_weights(checkpoints(tmp_path / "run")[-1], checkpoints(rewound)[-1])
    assert megamask("verify", "run", tmp_path / "run").code == 0


@pytest.mark.promise("two layouts rewind alike, and a run has at most resilience.max_rewinds of them")
def test_two_ranks_rewind_alike_and_stop_when_their_rewinds_are_used_up(
    rewound: Path, small_corpus: Path, tmp_path: Path
) -> None:
    options = (*REWIND, "layout.data_parallel_size=2", "resilience.max_rewinds=1")
    code, stderr = train(small_corpus, tmp_path, "two", *options, samples=(BAD_SAMPLE, 81), rank=0)
    assert code == 66
    assert "resilience.max_rewinds = 1 rewinds of this run are used up" in stderr
    assert read_rewinds(tmp_path / "two") == read_rewinds(rewound)
    expected, found = step_lines(rewound), step_lines(tmp_path / "two")
    assert sorted(found) == list(range(1, 8))  # the batch of step 8 begins at sample 80
    for step, line in found.items():
        assert (line["batch_digest"], line["content_digest"]) == (
            expected[step]["batch_digest"],
            expected[step]["content_digest"],
        )
