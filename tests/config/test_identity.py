from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.identity import compare_identity, extendable_fields, identity_fields, value_of
from megamask.config.keys import all_keys
from megamask.config.schema.roots import TrainConfig
from megamask.config.variants import meaningless_keys


def through_json(fields: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(fields))


def test_identity_fields_are_exactly_the_identity_keys_and_the_corpora(train):
    config = train().config
    fields = identity_fields(config)
    kinds = {name for name, key in all_keys(TrainConfig).items() if key.setting.kind == "identity"}
    assert set(fields) == kinds - meaningless_keys(config) | {"data.corpora"}
    assert fields["data.corpora"] == ["main"]
    assert fields["training.global_batch_size"] == 8


def test_extendable_fields_are_steps_and_names_of_corpora(train):
    assert extendable_fields(train().config) == {"training.steps": 20, "data.corpora": ["main"], "data.mixture": []}


def test_same_config_is_the_same_run_after_json(train):
    config = train("optimizer.learning_rate=1e-3").config
    compare_identity(through_json(identity_fields(config)), config)


@given(st.floats(min_value=5e-324, allow_infinity=False, allow_nan=False))
def test_every_learning_rate_is_itself_after_json(train, value):
    config = train().config
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=value))
    compare_identity(through_json(identity_fields(config)), config)


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=50",
        "training.micro_batch_size=4",
        "layout.tensor_parallel_size=2",
        "data.corpora.main=moved",
        "data.corpora.second=added",
        "run.output_dir=elsewhere",
        "run.name=renamed",
        "tracking.mlflow.enabled=false",
        "checkpoint.every_steps=3",
        "evaluation.rows=9",
    ],
)
def test_operational_and_extendable_changes_are_the_same_run(train, override):
    compare_identity(identity_fields(train().config), train(override).config)


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("run.seed=2", "run.seed is 2, recorded 1"),
        (
            "optimizer.learning_rate=0.0030000000000000005",
            "optimizer.learning_rate is 0.0030000000000000005, recorded 0.003",
        ),
        ("objective.complementary=false", "objective.complementary is false, recorded true"),
        ("objective.noise_schedule=cosine_md4", "objective.noise_schedule is 'cosine_md4', recorded 'linear'"),
        ("model.num_query_groups=4", "model.num_query_groups is 4, recorded null"),
        ("training.global_batch_size=16", "training.global_batch_size is 16, recorded 8"),
        ("data.seed=2", "data.seed is 2, recorded 1"),
    ],
)
def test_identity_change_is_refused_with_both_values(train, refusal, override, differs):
    stored = through_json(identity_fields(train().config))
    error = refusal(lambda: compare_identity(stored, train(override).config, where="runs/tiny/run.json"))
    assert differs in error.message
    assert "runs/tiny/run.json" in error.message
    assert "run.name" in error.hint


def test_every_difference_is_named_at_once(train, refusal):
    stored = identity_fields(train().config)
    message = refusal(lambda: compare_identity(stored, train("run.seed=2", "model.num_layers=3").config)).message
    assert "run.seed" in message
    assert "model.num_layers" in message
    assert "training.global_batch_size" not in message


def test_corpora_may_be_appended_to_but_not_renamed_reordered_or_removed(train, refusal):
    config = train("data.corpora.second=b").config
    stored = identity_fields(config) | {"data.corpora": ["main"]}
    compare_identity(stored, config)
    for names in (["other"], ["second", "main"], ["main", "second", "third"], [], None):
        assert "data.corpora" in refusal(lambda s=stored | {"data.corpora": names}: compare_identity(s, config)).message


def test_field_that_an_older_record_lacks_must_be_at_its_default(train, refusal):
    config = train().config
    stored = identity_fields(config)
    del stored["model.qk_norm"]
    compare_identity(stored, config)
    changed = train("model.qk_norm=true").config
    assert "model.qk_norm is true, recorded nothing" in refusal(lambda: compare_identity(stored, changed)).message


def test_field_that_this_version_does_not_know_is_refused(train, refusal):
    config = train().config
    stored = identity_fields(config) | {"model.num_wheels": 8}
    assert "model.num_wheels is recorded as 8" in refusal(lambda: compare_identity(stored, config)).message


def test_true_is_not_one(train, refusal):
    config = train().config
    stored = identity_fields(config) | {"model.qk_norm": 0}
    assert "model.qk_norm" in refusal(lambda: compare_identity(stored, config)).message


def test_value_of_walks_the_tree(train):
    assert value_of(train().config, "tracking.mlflow.experiment") == "megamask"
