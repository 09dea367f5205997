from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.standalone import load_checkpoint
from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.errors import CheckpointIntegrityError, DataIntegrityError, UsageError
from megamask.evaluation.request import EvaluationRequest
from megamask.evaluation.rows import text_rows
from megamask_pipelines.cli import evaluate as cli
from megamask_pipelines.evaluate import evaluate
from support.likelihood_oracle import counts, masked_positions
from support.tiny_run import SEED, SEQUENCE_LENGTH, write_corpus, write_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Commit]:
    return write_run(tmp_path_factory.mktemp("runs"), corpus)


def _evaluate(path: Path, **options: Any) -> dict[str, Any]:
    return evaluate(path, EvaluationRequest(**{"draws": 2, "replicates": 2} | options))


def test_validation_bound_equals_the_law_done_by_hand(run: tuple[Path, Commit], corpus: Path) -> None:
    run_dir, _ = run
    result = _evaluate(run_dir, rows=3)
    loaded = load_checkpoint(run_dir)
    network, _device = loaded.network()
    vocabulary = loaded.model.vocabulary
    reader = SplitReader(corpus, Manifest.load(corpus), "validation")
    means = []
    for replicate in range(2):
        total = 0.0
        for row in range(3):
            x_0 = torch.from_numpy(reader.read(row).tokens.astype("int64"))
            eligible = [at for at in range(SEQUENCE_LENGTH) if x_0[at] != vocabulary.pad_token_id]
            n = len(eligible)
            for member, k in enumerate(counts(row, n, draws=2, replicate=replicate, seed=SEED)):
                positions = masked_positions(row, eligible, k, draw=replicate * 2 + member, seed=SEED)
                x_t = x_0.clone()
                x_t[positions] = vocabulary.mask_token_id
                with torch.no_grad():
                    hidden = network(x_t[None])[0, positions]
                    logits = network.logits(hidden, excluded_ids=frozenset((vocabulary.mask_token_id,)))
                total += n / k * float(functional.cross_entropy(logits, x_0[positions], reduction="sum")) / 2
        means.append(total / result["num_tokens"])
    assert result["nelbo_nats_per_token"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert result["standard_error"] == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-3)
    assert result["num_samples"] == 3


def test_report_counts_the_tokens_and_bytes_of_the_scored_rows(run: tuple[Path, Commit], corpus: Path) -> None:
    result = _evaluate(run[0], rows=2)
    tokenizer = load_checkpoint(run[0]).tokenizer
    reader = SplitReader(corpus, Manifest.load(corpus), "validation")
    tokens = [int(token) for row in range(2) for token in reader.read(row).tokens]
    words = [token for token in tokens if token not in (tokenizer.pad_token_id, tokenizer.eod_token_id)]
    assert result["num_tokens"] == sum(token != tokenizer.pad_token_id for token in tokens)
    assert result["num_bytes"] == len(tokenizer.decode_bytes(words))
    expected = result["nelbo_nats_per_token"] * result["num_tokens"] / math.log(2) / result["num_bytes"]
    assert result["bits_per_byte"] == pytest.approx(expected)


def test_untrained_network_is_close_to_uniform(run: tuple[Path, Commit]) -> None:
    result = _evaluate(run[0], rows=4)
    assert result["nelbo_nats_per_token"] == pytest.approx(math.log(269), abs=0.3)  # the mask id is excluded


def test_checkpoint_copied_elsewhere_scores_the_same_text_alike(run: tuple[Path, Commit], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma delta " * 30)
    shutil.copytree(run[1].folder, tmp_path / "copy")
    first, second = (_evaluate(path, texts=[text]) for path in (run[0], tmp_path / "copy"))
    assert {**first, "checkpoint": ""} == {**second, "checkpoint": ""}


def test_split_is_found_from_the_checkpoint_folder_of_a_run_and_by_corpus_option(
    run: tuple[Path, Commit], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(run[1].folder, tmp_path / "copy")
    from_run = _evaluate(run[0], rows=2)
    assert _evaluate(run[1].folder, rows=2) == from_run
    given = _evaluate(tmp_path / "copy", rows=2, corpus=corpus)
    assert given["nelbo_nats_per_token"] == from_run["nelbo_nats_per_token"]
    with pytest.raises(UsageError, match="not in a run directory"):
        _evaluate(tmp_path / "copy")


def test_split_is_scored_as_the_run_was_trained_unless_an_option_says_otherwise(
    run: tuple[Path, Commit], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _evaluate(run[0], rows=2)
    record = SimpleNamespace(content={"identity": {"data.score": "answers"}})
    monkeypatch.setattr("megamask.audit.corpora.read_run", lambda folder: record)
    with pytest.raises(UsageError, match="--score is answers, but the first 2 rows"):
        _evaluate(run[0], rows=2)
    assert _evaluate(run[0], rows=2, score="all") == expected


def test_texts_are_packed_in_file_order_with_an_end_after_each(run: tuple[Path, Commit], tmp_path: Path) -> None:
    files = [tmp_path / "b.txt", tmp_path / "a.txt"]
    files[0].write_text("alpha beta <|mask|> ")
    files[1].write_text("gamma " * 40)
    checkpoint = load_checkpoint(run[0])
    tokenizer = checkpoint.tokenizer
    rows = text_rows(files, checkpoint.tokenizer, checkpoint.model.spec.max_sequence_length)
    expected = [token for file in files for token in [*tokenizer.encode(file.read_text()), tokenizer.eod_token_id]]
    flat = rows.flatten().tolist()
    assert flat[: len(expected)] == expected
    assert set(flat[len(expected) :]) <= {tokenizer.pad_token_id}
    assert rows.shape[1] == SEQUENCE_LENGTH and len(flat) - len(expected) < SEQUENCE_LENGTH
    assert tokenizer.mask_token_id not in flat


def test_seed_changes_the_masks_and_the_default_is_the_seed_of_the_run(run: tuple[Path, Commit]) -> None:
    default, same, other = (_evaluate(run[0], rows=2, seed=seed) for seed in (None, SEED, 1))
    assert default == same
    assert default["nelbo_nats_per_token"] != other["nelbo_nats_per_token"]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, UsageError, "cannot be read"),
        (b"", UsageError, "is empty"),
        (b"alpha \xff\xfe", DataIntegrityError, "not UTF-8 at byte 6"),
    ],
)
def test_text_that_cannot_be_scored_is_refused(
    run: tuple[Path, Commit], tmp_path: Path, data: bytes | None, error: type[Exception], words: str
) -> None:
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(error, match=words):
        _evaluate(run[0], texts=[tmp_path / "text.txt"])


def test_corpus_of_another_tokenizer_is_refused(run: tuple[Path, Commit], tmp_path: Path) -> None:
    other = write_corpus(tmp_path, words=("entirely", "different", "words"))
    with pytest.raises(UsageError, match="tokenizer mismatch"):
        _evaluate(run[0], corpus=other)


def test_corpus_with_rows_of_another_length_is_refused(run: tuple[Path, Commit], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have 16 tokens, the model's 32"):
        _evaluate(run[0], corpus=write_corpus(tmp_path, sequence_length=16))


def test_run_whose_corpus_was_replaced_is_refused(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    run_dir, _ = write_run(tmp_path, tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus")
    shutil.move(write_corpus(tmp_path / "other", words=("alpha", "beta")), tmp_path / "corpus")
    with pytest.raises(UsageError, match="but the checkpoint was trained on"):
        _evaluate(run_dir)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rows": 0}, "--rows is 0"), ({"draws": 0}, "draws is 0"), ({"seed": -1}, "--seed is -1")],
)
def test_numbers_out_of_range_are_refused(run: tuple[Path, Commit], options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _evaluate(run[0], **options)


def test_damaged_checkpoint_is_refused(run: tuple[Path, Commit], tmp_path: Path) -> None:
    shutil.copytree(run[1].folder, tmp_path / "copy")
    with (tmp_path / "copy" / "state-00000.safetensors").open("r+b") as file:
        file.seek(100)
        file.write(b"\x55\xaa")
    with pytest.raises(CheckpointIntegrityError, match=r"state-00000\.safetensors has sha256"):
        _evaluate(tmp_path / "copy")


def test_verb_answers_with_the_contract_keys_as_json(run: tuple[Path, Commit]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = parser.parse_args([str(run[0]), "--split", "validation", "--rows", "2", "--draws", "1"])
    result = cli.run(arguments)
    json.dumps(result, allow_nan=False)
    expected = {"nelbo_nats_per_token", "standard_error", "bits_per_byte", "num_tokens", "num_bytes", "num_samples"}
    assert expected <= set(result)
    assert f"{result['nelbo_nats_per_token']:.4f} nats per token" in cli.render(result)


def test_verb_refuses_a_corpus_beside_text(run: tuple[Path, Commit]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(UsageError, match="--corpus was given with --text"):
        cli.run(parser.parse_args([str(run[0]), "--text", "x", "--corpus", "y"]))
