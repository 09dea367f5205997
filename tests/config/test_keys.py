from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass

import pytest

from megamask.config.keys import all_keys, all_sections, find_key, nearest
from megamask.config.schema.field import identity, operational
from megamask.config.schema.roots import PrepareConfig, TrainConfig

ROOTS = (TrainConfig, PrepareConfig)


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_has_a_meaning_a_kind_and_a_default_in_range(root):
    for key in all_keys(root).values():
        assert key.setting.doc
        assert key.setting.kind in ("identity", "extendable", "operational")
        if key.default is None:
            assert key.is_optional
        elif key.default is not MISSING:
            assert key.setting.accepts(key.default), key.name


@pytest.mark.parametrize("root", ROOTS)
def test_every_section_is_frozen_keyword_only_and_documented(root):
    for section in (root, *all_sections(root).values()):
        assert section.__doc__
        assert not section.__doc__.startswith(f"{section.__name__}(")
        assert section.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(section))


def test_keys_that_others_rely_on_exist():
    promised = [
        "run.name",
        "run.output_dir",
        "run.seed",
        "data.corpora",
        "data.seed",
        "data.shuffle_window_blocks",
        "training.steps",
        "training.stop_after_step",
        "training.global_batch_size",
        "training.micro_batch_size",
        "training.sequence_length",
        "layout.tensor_parallel_size",
        "layout.pipeline_parallel_size",
        "layout.data_parallel_size",
        "layout.sequence_parallel",
        "objective.complementary",
        "objective.noise_schedule",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.asynchronous",
        "checkpoint.keep_every_steps",
        "checkpoint.keep_best",
        "precision.compute",
        "model.num_layers",
        "model.hidden_size",
        "model.num_attention_heads",
        "tracking.mlflow.uri",
    ]
    assert set(promised) <= set(all_keys(TrainConfig))
    prepare = [
        "inputs",
        "validation_fraction",
        "output_dir",
        "sequence_length",
        "tokenizer.vocab_size",
        "tokenizer.path",
    ]
    assert {f"corpus.{name}" for name in prepare} <= set(all_keys(PrepareConfig))


def test_kinds_follow_the_config_law():
    kinds = {name: key.setting.kind for name, key in all_keys(TrainConfig).items()}
    assert {name for name, kind in kinds.items() if kind == "extendable"} == {
        "training.steps",
        "data.corpora",
        "data.mixture",
    }
    for section in ("model", "objective", "optimizer", "precision"):
        assert {kind for name, kind in kinds.items() if name.startswith(f"{section}.")} == {"identity"}
    for section in ("layout", "checkpoint", "tracking"):
        assert {kind for name, kind in kinds.items() if name.startswith(f"{section}.")} == {"operational"}
    assert kinds["run.seed"] == kinds["data.seed"] == kinds["evaluation.seed"] == "identity"
    assert kinds["training.global_batch_size"] == "identity"
    assert kinds["training.micro_batch_size"] == kinds["run.output_dir"] == "operational"


@pytest.mark.parametrize("root", ROOTS)
def test_nearest_of_every_key_with_one_letter_lost_is_that_key(root):
    for name in all_keys(root):
        section, _, last = name.rpartition(".")
        if len(last) < 5:
            continue
        misspelt = f"{section}.{last[:2]}{last[3:]}"
        assert nearest(misspelt, root) == name


def test_nearest_finds_the_key_under_its_right_section():
    assert nearest("model.global_batch_size", TrainConfig) == "training.global_batch_size"
    assert nearest("steps", TrainConfig) == "training.steps"


def test_find_key_knows_entries_of_a_mapping():
    assert find_key("data.corpora.main", TrainConfig).name == "data.corpora"
    assert find_key("training.steps", TrainConfig).name == "training.steps"
    assert find_key("data.corpora2", TrainConfig) is None


def test_allowed_says_type_range_and_null():
    keys = all_keys(TrainConfig)
    assert keys["training.steps"].allowed == "an integer >= 1"
    assert keys["checkpoint.every_steps"].allowed == "an integer >= 1, or null"
    assert keys["objective.noise_schedule"].allowed == "linear, cosine_md4, cosine_bd3, polynomial, sqrt, spindle"
    assert keys["run.seed"].allowed == "an integer >= 0 and <= 18446744073709551615"
    assert keys["checkpoint.every_steps"].type_name == "int | None"
    assert keys["data.corpora"].type_name == "dict[str, str]"


def test_schema_with_a_type_that_no_value_has_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        value: int | str = identity("two types", default=1)

    @dataclass(frozen=True, kw_only=True)
    class Unknown:
        value: complex = operational("no such type", default=1)

    for root in (Wrong, Unknown):
        with pytest.raises((TypeError, NameError)):
            all_keys(root)
