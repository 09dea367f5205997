"""A run on a mixture: killed and resumed at another size it reads the same bytes, and every corpus is measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.command import ROOT, journal, megamask, start, step_lines, tiny

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 12
DATA = ("batch_digest", "content_digest", "consumed_by_source", "consumed_samples", "num_tokens")


@pytest.fixture(scope="module")
def second_corpus(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """Other texts under the tokenizer of the first corpus."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "texts").mkdir()
    for number in range(30):
        words = " ".join(f"{number} of {word * number}," for word in range(60))
        (folder / "texts" / f"{number:03d}.txt").write_text(words, encoding="utf-8")
    done = megamask(
        "prepare",
        ROOT / "configs" / "corpus" / "python_stdlib.yaml",
        f"corpus.inputs=['{folder}/texts/*.txt']",
        f"corpus.output_dir={folder}/corpus",
        f"corpus.tokenizer.path={small_corpus}/tokenizer",
        "corpus.tokenizer.vocab_size=null",
        "corpus.sequence_length=64",
        "corpus.validation_fraction=0.1",
        "corpus.rows_per_block=16",
    )
    assert done.code == 0, done.stderr
    return folder / "corpus"


def arguments(first: Path, second: Path, runs: Path, name: str, *more: str) -> list[str]:
    mixture = "data.mixture=[{until_tokens: 3000, weights: {main: 3, other: 1}}, {weights: {main: 1, other: 2}}]"
    steps = (f"training.steps={STEPS}", "checkpoint.every_steps=3", "evaluation.every_steps=6", "evaluation.rows=2")
    return tiny(first, runs, name, f"data.corpora.other={second}", mixture, *steps, *more)


def kill_after_step(process: object, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:  # type: ignore[attr-defined]
        lines = [path.read_text().count('"kind":"step"') for path in run_dir.glob("journal/*.jsonl")]
        if sum(lines) >= step:  # the last line may be half written
            break
        time.sleep(0.02)
    process.kill()  # type: ignore[attr-defined]
    process.communicate()  # type: ignore[attr-defined]


@pytest.mark.promise("a mixture killed and resumed at another data-parallel size reads the same bytes of each source")
def test_killed_mixture_resumed_at_another_size_reads_the_same_bytes(
    tmp_path: Path, small_corpus: Path, second_corpus: Path
) -> None:
    whole = arguments(small_corpus, second_corpus, tmp_path, "whole")
    assert megamask("train", *whole).code == 0
    killed = arguments(small_corpus, second_corpus, tmp_path, "killed")
    kill_after_step(start("train", *killed, "layout.data_parallel_size=2"), tmp_path / "killed", 4)
    done = megamask("train", *killed, "layout.data_parallel_size=1", "--json")
    assert (done.code, done.json["step"]) == (0, STEPS), done.stderr
    expected, found = step_lines(tmp_path / "whole"), step_lines(tmp_path / "killed")
    assert sorted(found) == list(range(1, STEPS + 1))
    sizes = [record["layout"]["data_parallel_size"] for record in journal(tmp_path / "killed") if "layout" in record]
    assert sizes == [2, 1]
    for step, record in expected.items():
        assert {name: found[step].get(name) for name in DATA} == {name: record.get(name) for name in DATA}, step
    assert expected[STEPS]["consumed_by_source"]["other"] > 0
    measured = [record for record in journal(tmp_path / "whole") if record["kind"] == "evaluation"][-1]
    assert set(measured["by_source"]) == {"main", "other"}
    assert measured["by_source"]["main"]["nelbo_nats_per_token"] == measured["nelbo_nats_per_token"]
    assert measured["by_source"]["other"]["nelbo_nats_per_token"] != measured["nelbo_nats_per_token"]
