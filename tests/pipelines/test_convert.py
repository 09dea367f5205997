from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megamask.checkpoint.standalone import load_checkpoint
from megamask.errors import UsageError
from megamask_pipelines.cli import convert as cli
from support.tiny_run import write_corpus, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    return write_run(folder, write_corpus(folder))[0]


def _convert(run_dir: Path, target: Path, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    result = cli.run(parser.parse_args(["to-hf", str(run_dir), str(target), *arguments]))
    json.dumps(result, allow_nan=False)
    return result


@pytest.mark.promise("An exported checkpoint loads in transformers without remote code and gives the same logits")
def test_transformers_gives_the_logits_of_the_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    result = _convert(run_dir, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    network, _ = load_checkpoint(run_dir).network()
    tokens = torch.randint(0, network.spec.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    full = torch.zeros(2, 1, 24, 24)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=full).logits
        head = network.model.embed_tokens if network.spec.tie_embeddings else network.lm_head
        found = network(tokens) @ head.weight.T
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert result["step"] == 20
    assert result["tensors"] == len(network.state_dict())
    assert "read back and compared" in cli.render(result)


def test_the_tokenizer_and_the_record_come_with_the_weights(run_dir: Path, tmp_path: Path) -> None:
    _convert(run_dir, tmp_path / "hf", "--dtype", "bf16")
    checkpoint = load_checkpoint(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "alpha beta, and some more.\n"
    assert tokenizer.encode(text, add_special_tokens=False) == checkpoint.tokenizer.encode(text)
    assert tokenizer.mask_token_id == checkpoint.model.vocabulary.mask_token_id
    record = json.loads((tmp_path / "hf" / "megamask.json").read_text())
    assert record["attention"] == "bidirectional"
    assert record["target_shift"] is False
    assert record["mask_token_id"] == checkpoint.model.vocabulary.mask_token_id
    assert record["checkpoint"] == checkpoint.commit.digest
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--family", "gpt"), "--family is 'gpt'"),
        (("--family", "sdar"), "attend block_causal"),
        (("--dtype", "f8"), "--dtype is 'f8'"),
    ],
)
def test_a_conversion_that_does_not_fit_writes_nothing(
    run_dir: Path, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        _convert(run_dir, tmp_path / "hf", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_line_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli._Progress()
    progress._last -= 11
    progress(1, 4)
    progress(2, 4)
    assert capsys.readouterr().err == "convert: 25% of 4 bytes written and compared\n"
