from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import UsageError
from megamask_pipelines.cli import sample as cli
from support.tiny_run import SEQUENCE_LENGTH, write_corpus, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    return write_run(folder, write_corpus(folder))[0]


@pytest.fixture(scope="module")
def tokenizer(run_dir: Path) -> CorpusTokenizer:
    return CorpusTokenizer.load(run_dir.parent / "corpus" / "tokenizer")


def _sample(run_dir: Path, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    result = cli.run(parser.parse_args([str(run_dir), *arguments]))
    json.dumps(result, allow_nan=False)
    return result


@pytest.mark.promise("a prompt that is not UTF-8 is refused, not replaced")
@pytest.mark.parametrize("option", ["--prompt", "--infill"])
def test_prompt_of_bytes_that_are_not_utf8_is_refused(run_dir: Path, option: str) -> None:
    with pytest.raises(UsageError, match=rf"{option} is not UTF-8 text: character 2 is the byte 0xe9"):
        _sample(run_dir, option, b"al\xe9".decode("utf-8", "surrogateescape"))


def test_prompt_is_kept_and_continued_by_the_asked_length(run_dir: Path, tokenizer: CorpusTokenizer) -> None:
    result = _sample(run_dir, "--prompt", "alpha beta", "--length", "7", "--steps", "3")
    prompt = tokenizer.encode("alpha beta")
    assert result["tokens"][: len(prompt)] == prompt
    assert len(result["tokens"]) == len(prompt) + 7
    assert result["num_denoising_steps"] == result["nfe"] == 3
    assert result["text"].startswith("alpha beta")
    assert len(result["infilled"]) == 1
    assert cli.render(result) == result["text"]


def test_infill_keeps_the_text_around_its_spans(run_dir: Path, tokenizer: CorpusTokenizer) -> None:
    result = _sample(run_dir, "--infill", "alpha<|mask:3|> gamma<|mask|> delta", "--temperature", "1.5", "--seed", "3")
    head, middle, tail = (tokenizer.encode(text) for text in ("alpha", " gamma", " delta"))
    tokens = result["tokens"]
    assert tokens[: len(head)] == head
    assert tokens[len(head) + 3 : len(head) + 3 + len(middle)] == middle
    assert tokens[-len(tail) :] == tail
    assert len(result["infilled"]) == 2 and result["nfe"] == 4


def test_mask_and_padding_are_never_written(run_dir: Path, tokenizer: CorpusTokenizer) -> None:
    for seed in range(4):
        result = _sample(run_dir, "--temperature", "20", "--seed", str(seed), "--steps", "2")
        assert len(result["tokens"]) == SEQUENCE_LENGTH
        assert not {tokenizer.mask_token_id, tokenizer.pad_token_id} & set(result["tokens"])


def test_sample_is_a_function_of_its_seed(run_dir: Path) -> None:
    arguments = ("--prompt", "beta", "--length", "8", "--temperature", "2")
    first, again, other = (_sample(run_dir, *arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert first["tokens"] != other["tokens"]


def test_continuation_ends_at_the_end_of_document_that_the_model_wrote(
    run_dir: Path, tokenizer: CorpusTokenizer
) -> None:
    for seed in range(300):
        arguments = ("--prompt", "beta", "--temperature", "30", "--steps", "1", "--seed", str(seed))
        result = _sample(run_dir, *arguments)
        response = result["tokens"][len(tokenizer.encode("beta")) :]
        if tokenizer.eod_token_id in response:
            break
    else:
        pytest.fail("no seed wrote an end of document")
    kept = response[: response.index(tokenizer.eod_token_id)]
    assert result["infilled"] == [tokenizer.decode(kept)]
    assert result["text"] == "beta" + tokenizer.decode(kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "alpha", "--length", "500"), "the model's rows hold 32"),
        (("--prompt", "zq" * 60), "the model's rows hold 32"),
        (("--infill", "no span here"), "no <\\|mask:N\\|> span"),
        (("--infill", "a<|mask:99|>"), "the model's rows hold 32"),
        (("--infill", "a<|mask:2|>", "--length", "3"), "--infill alone"),
        (("--length", "4", "--steps", "5"), "5 denoising steps for 4 masked tokens"),
        (("--length", "0"), "--length is 0"),
        (("--seed", "-1"), "--seed is -1"),
        (("--temperature", "-1"), "--temperature is -1.0"),
    ],
)
def test_what_cannot_be_decoded_is_refused(run_dir: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _sample(run_dir, *arguments)


def test_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run directory nor a checkpoint folder"):
        _sample(tmp_path)
