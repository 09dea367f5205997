"""A run killed with SIGKILL at random moments ends bit-identical to the uninterrupted one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from megamask.checkpoint.contents import read_model
from megamask.engine.state.restore import read_canonical_weights
from support.command import checkpoints, megamask, start, step_lines, tiny

pytestmark = pytest.mark.multiprocess

STEPS = 60
SEED = 20260


def arguments(corpus: Path, runs: Path, name: str) -> list[str]:
    return tiny(corpus, runs, name, f"training.steps={STEPS}", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    runs = tmp_path_factory.mktemp("kill")
    assert megamask("train", *arguments(small_corpus, runs, "whole")).code == 0
    return runs / "whole"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = checkpoints(run_dir)[-1]
    return dict(read_canonical_weights(folder, read_model(folder).spec))


def progress(run_dir: Path) -> int:
    """Bytes of journal: grows with every step."""
    return sum(path.stat().st_size for path in (run_dir / "journal").glob("*.jsonl")) if run_dir.is_dir() else 0


def kill_at_a_random_moment(generator: random.Random, corpus: Path, runs: Path, name: str) -> bool:
    """Starts the run and kills it, sometimes while starting, mostly soon after its first new step; was it running?"""
    process = start("train", *arguments(corpus, runs, name))
    if generator.random() < 0.2:
        time.sleep(generator.uniform(0, 4))
    else:
        before, deadline = progress(runs / name), time.monotonic() + 60
        while progress(runs / name) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.5))
    was_running = process.poll() is None
    process.kill()
    process.communicate()
    return was_running


@pytest.mark.promise("a run killed at random moments and restarted ends bit-identical")
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)], ids=["three_kills", "ten_kills"])
def test_killed_run_ends_bit_identical_to_the_uninterrupted_one(
    kills: int, uninterrupted: Path, small_corpus: Path
) -> None:
    runs, name = uninterrupted.parent, f"killed-{kills}"
    generator = random.Random(SEED + kills)
    for _ in range(kills):
        assert kill_at_a_random_moment(generator, small_corpus, runs, name), "the run was over before the kill"
    done = megamask("train", *arguments(small_corpus, runs, name), "--json")
    assert (done.code, done.json["step"]) == (0, STEPS), done.stderr
    assert step_lines(runs / name) == step_lines(uninterrupted)
    expected, found = weights(uninterrupted), weights(runs / name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
