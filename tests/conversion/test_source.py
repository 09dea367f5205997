"""Tokens that a source and the corpus must share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megamask.checkpoint.standalone import load_checkpoint
from megamask.conversion.source import Source, check_network, check_tokenizer, open_source
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import UsageError
from support.hub_models import LLADA2, save_hub_folder
from support.tiny_run import write_corpus, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return write_run(folder, write_corpus(folder))[0]


@pytest.fixture(scope="module")
def source(run_dir: Path) -> Source:
    return open_source(str(run_dir))


def _written_otherwise(tokenizer: CorpusTokenizer) -> CorpusTokenizer:
    """The same tokenizer from other bytes."""
    document = json.loads(tokenizer.files()["tokenizer.json"])
    return CorpusTokenizer(json.dumps(document, indent=7).encode(), tokenizer.special, name="tokenizer.json")


@pytest.mark.promise("A checkpoint of a run is no source for a corpus of another tokenizer unless the config allows it")
def test_tokenizer_of_another_digest_is_refused_with_the_key_that_allows_it(run_dir: Path, source: Source) -> None:
    own = load_checkpoint(run_dir).tokenizer
    check_tokenizer(source, own, allows_other=False)
    other = _written_otherwise(own)
    assert other.digest != own.digest
    with pytest.raises(
        UsageError, match=f"trained with tokenizer {own.digest}, the corpus has {other.digest}"
    ) as found:
        check_tokenizer(source, other, allows_other=False)
    assert "initialise.allow_other_tokenizer=true" in str(found.value.hint)
    check_tokenizer(source, other, allows_other=True)
    published = dataclasses.replace(source, has_corpus_tokenizer=False)
    check_tokenizer(published, other, allows_other=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale": 1.0}, "model.router_scale is 2.5 in the source and 1.0 here"),
        ({"num_groups": 1, "topk_groups": 1}, "model.router_groups is 4 in the source and 1 here"),
        ({"normalizes": False}, "model.router_normalize is True in the source and False here"),
        ({"has_bias": False}, "model.layers.1.mlp.gate.expert_bias is only in the source"),
        ({"num_dense_layers": 0}, "model.layers.0.mlp.gate.weight is only here"),
    ],
)
@pytest.mark.promise("A router that computes otherwise than the source's is refused before anything starts")
def test_router_that_computes_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    save_hub_folder(tmp_path / "hf", LLADA2)
    source = open_source(f"hf:{tmp_path / 'hf'}")
    experts = source.spec.experts
    assert experts is not None
    check_network(source, dataclasses.replace(source.spec, experts=dataclasses.replace(experts, balance_weight=0.1)))
    spec = dataclasses.replace(source.spec, experts=dataclasses.replace(experts, **change))
    with pytest.raises(UsageError, match="another network: ") as found:
        check_network(source, spec)
    assert named in str(found.value)
