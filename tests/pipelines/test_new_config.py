"""`megamask new-config`, then `megamask prepare` and `megamask train --check` on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.config.load import load_prepare_config, load_train_config
from megamask.config.validate import validate_prepare, validate_train
from megamask.data.manifest import open_corpus
from megamask_pipelines.cli.main import main


@pytest.mark.promise("`megamask new-config` writes configs that fit and never overwrites one")
def test_new_configs_fit_and_are_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-config", "mine"]) == 0
    assert "megamask train mine/run.yaml --check" in capsys.readouterr().out
    prepare, train = load_prepare_config("mine/corpus.yaml"), load_train_config("mine/run.yaml")
    validate_prepare(prepare.config, prepare.origins)
    validate_train(train.config, train.origins)
    assert prepare.config.corpus.output_dir == train.config.data.corpora["main"]
    assert prepare.config.corpus.sequence_length == train.config.training.sequence_length
    Path("mine/corpus.yaml").unlink()
    before = Path("mine/run.yaml").read_bytes()
    assert main(["new-config", "mine"]) == 2
    assert "mine/run.yaml is there already. Nothing was written." in capsys.readouterr().err
    assert not Path("mine/corpus.yaml").exists()
    assert Path("mine/run.yaml").read_bytes() == before


@pytest.mark.promise("`megamask train --check` counts a run without starting it")
def test_check_counts_the_run_and_starts_nothing(tmp_path, small_corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-config"]) == 0
    manifest = open_corpus(small_corpus, "data.corpora.main")
    length, rows = manifest.sequence_length, manifest.split("train").num_rows
    overrides = [f"data.corpora.main={small_corpus}", f"training.sequence_length={length}", "evaluation.rows=2"]
    capsys.readouterr()
    assert main(["train", "run.yaml", *overrides, "layout.data_parallel_size=2", "--check", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    # embedding and head, then per layer: attention 4 d^2, feed-forward 3 d f, two norms; the last norm
    weights = 2 * manifest.vocab_size * 128 + 4 * (4 * 128**2 + 3 * 128 * 384 + 2 * 128) + 128
    assert answer["parameters"] == weights
    assert answer["checkpoint_bytes"] == 12 * weights
    memory = answer["per_rank"]
    # float32: weights and all gradients, half of the two moments on each of two ranks; buffers are padded
    assert memory["parameters_bytes"] == memory["gradients_bytes"] == pytest.approx(4 * weights, rel=0.05)
    assert memory["optimizer_bytes"] == pytest.approx(4 * weights, rel=0.05)
    assert memory["activations_bytes"] > 0 and memory["other_bytes"] == 0
    assert (answer["rows"], answer["steps_per_epoch"]) == (rows, rows / 16)
    assert answer["epochs"] == 500 * 16 / rows
    assert (answer["processes"], answer["micro_batches"]) == (2, 1)
    # every weight of a matrix takes 6 operations for each position; a pair's head scores half of the positions
    matrices = 4 * (4 * 128**2 + 3 * 128 * 384) + 0.5 * manifest.vocab_size * 128
    attention = 4 * 2 * length * 128
    assert answer["flops_per_token"] == pytest.approx(6 * (matrices + attention), rel=1e-12)
    assert answer["flops_per_step"] == pytest.approx(answer["flops_per_token"] * 16 * 2 * length, rel=1e-12)
    assert main(["train", "run.yaml", *overrides, "--check"]) == 0
    assert "can be trained; nothing was started" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.yaml", "run.yaml"}
    assert main(["train", "run.yaml", *overrides, "data.corpora.main=absent", "--check"]) != 0
