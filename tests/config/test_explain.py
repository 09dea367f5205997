from __future__ import annotations

import pytest

from megamask.config.explain import explain
from megamask.config.keys import all_keys
from megamask.config.schema.roots import PrepareConfig, TrainConfig


def test_key_is_explained_in_full():
    assert explain("checkpoint.every_steps") == [
        {
            "key": "checkpoint.every_steps",
            "command": "train",
            "doc": "commit a checkpoint every so many steps; null means only at the end",
            "type": "int | None",
            "unit": "steps",
            "default": None,
            "required": False,
            "allowed": "an integer >= 1, or null",
            "kind": "operational",
            "kind_meaning": "may change with every attempt",
        }
    ]


def test_value_comes_with_who_set_it(train):
    train()
    assert pick(explain("training.steps", "run.yaml")[0]) == (20, "run.yaml:11")
    assert pick(explain("training.steps", "run.yaml", ["training.steps=7"])[0]) == (7, "override")
    assert pick(explain("layout.data_parallel_size", "run.yaml")[0]) == (1, "default")
    assert pick(explain("data.corpora.main", "run.yaml")[0]) == ("corpora/main", "run.yaml:7")
    assert pick(explain("corpus.inputs", "prepare.yaml")[0]) == (["texts/*.txt"], "prepare.yaml:2")


def pick(setting):
    return setting["value"], setting["set_by"]


def test_section_lists_its_keys_those_of_subsections_too():
    assert [setting["key"] for setting in explain("layout")] == [
        "layout.tensor_parallel_size",
        "layout.pipeline_parallel_size",
        "layout.virtual_pipeline_parallel_size",
        "layout.pipeline_split",
        "layout.context_parallel_size",
        "layout.expert_parallel_size",
        "layout.expert_tensor_parallel_size",
        "layout.data_parallel_size",
        "layout.sequence_parallel",
    ]
    assert "tracking.mlflow.uri" in [setting["key"] for setting in explain("tracking")]


def test_without_a_key_everything_is_listed(train):
    train()
    assert [setting["key"] for setting in explain(None)] == [*all_keys(TrainConfig), *all_keys(PrepareConfig)]
    keys = [setting["key"] for setting in explain(None, "prepare.yaml")]
    assert keys == list(all_keys(PrepareConfig))
    keys = [setting["key"] for setting in explain(None, "run.yaml", ["data.corpora.second=b"])]
    assert {"data.corpora.main", "data.corpora.second"} <= set(keys)
    assert "data.corpora" not in keys


def test_required_key_says_so():
    assert explain("training.steps")[0]["required"]
    assert explain("training.steps")[0]["default"] is None
    assert not explain("training.micro_batch_size")[0]["required"]


@pytest.mark.promise("an error for an unknown key names the nearest known key")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("objective.noise_shedule", "objective.noise_schedule"),
        ("corpus.sequence_lenght", "corpus.sequence_length"),
        ("vocab_size", "corpus.tokenizer.vocab_size"),
        ("layuot", "layout"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_of_both_trees(refusal, name, meant):
    error = refusal(explain, name)
    assert error.message == f"unknown key {name}"
    assert error.hint == f"did you mean {meant}?"


def test_wrong_config_is_refused(train, refusal):
    assert "training.steps" in refusal(lambda: explain("layout", train() and "run.yaml", ["training.steps=0"])).message
