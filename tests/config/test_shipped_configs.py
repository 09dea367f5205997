"""The configs of the repository mean what they should and fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megamask.config.load import load_prepare_config, load_train_config
from megamask.config.rules.layout import allowed_tensor_parallel_sizes
from megamask.config.schema.layout import shared_numbers
from megamask.config.validate import validate_prepare, validate_train

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_config_loads_and_fits(path):
    loaded = load_train_config(path)
    validate_train(loaded.config, loaded.origins)
    assert list(loaded.config.data.corpora) == ["main"]
    assert loaded.config.run.name == path.stem


def test_expected_configs_are_there():
    assert {path.stem for path in RUNS} >= {"tiny", "quickstart", "1.7b", "1.7b_fp8", "8b_fp8"}
    assert {path.stem for path in MODELS} == {
        "tiny",
        "quickstart",
        "170m",
        "1b",
        "1.7b",
        "8b",
        "100b",
        "tiny_moe",
        "llada2_mini",
        "llada2_flash",
        "llada_moe",
        "qwen3_30b_a3b",
    }


@pytest.mark.parametrize("path", sorted((CONFIGS / "corpus").glob("*.yaml")), ids=lambda path: path.stem)
def test_corpus_config_loads_and_fits(path):
    loaded = load_prepare_config(path)
    validate_prepare(loaded.config, loaded.origins)
    assert (
        loaded.config.corpus.sequence_length
        == load_train_config(CONFIGS / "run/tiny.yaml").config.training.sequence_length
    )


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_config_fits_a_run_and_splits_over_two_tensor_ranks(path, tmp_path):
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == ["model"]
    run = tmp_path / "run.yaml"
    run.write_text(f"defaults: [{CONFIGS}/run/tiny.yaml, {path}]\n", encoding="utf-8")
    loaded = load_train_config(run)
    validate_train(loaded.config, loaded.origins)
    assert loaded.origins["model.num_layers"].startswith(str(path))
    assert 2 in allowed_tensor_parallel_sizes(shared_numbers(loaded.config))


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 1000])
def test_tiny_run_takes_any_number_of_steps(steps):
    loaded = load_train_config(CONFIGS / "run/tiny.yaml", [f"training.steps={steps}"])
    validate_train(loaded.config, loaded.origins)
