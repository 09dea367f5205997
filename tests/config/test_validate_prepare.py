from __future__ import annotations

import pytest

from megamask.config.load import load_prepare_config
from megamask.config.validate import validate_prepare
from support.config_files import write_configs

PREPARE_REFUSED = {
    ("corpus.inputs=[]",): "corpus.inputs is [], which names no text",
    ("corpus.sequence_length=100",): "a multiple of 16; the nearest are 96 or 112",
    ("corpus.tokenizer.vocab_size=null",): "neither is set",
    ("corpus.tokenizer.path=t.json",): "both are set",
    ("corpus.tokenizer.eod_token=''",): "corpus.tokenizer.eod_token is '', which is empty",
    ("corpus.tokenizer.mask_token=<|pad|>",): "which corpus.tokenizer.pad_token is too",
    ("corpus.output_dir=s3://bucket/corpus",): "copy the finished corpus to a store, manifest.json last",
    ("corpus.jsonl_text_key=''",): "corpus.jsonl_text_key is ''",
}


@pytest.mark.parametrize("overrides", PREPARE_REFUSED, ids=" ".join)
def test_preparation_that_does_not_fit_is_refused(tmp_path, refusal, overrides):
    write_configs(tmp_path)
    loaded = load_prepare_config(tmp_path / "prepare.yaml", overrides)
    assert PREPARE_REFUSED[overrides] in refusal(validate_prepare, loaded.config, loaded.origins).message


@pytest.mark.parametrize("overrides", [(), ("corpus.tokenizer.vocab_size=null", "corpus.tokenizer.path=t.json")])
def test_preparation_that_fits_is_accepted(tmp_path, overrides):
    write_configs(tmp_path)
    validate_prepare(load_prepare_config(tmp_path / "prepare.yaml", overrides).config)
