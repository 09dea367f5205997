from __future__ import annotations

import json

import pytest

from megamask_pipelines.cli.main import main
from support.config_files import write_configs


@pytest.fixture
def explain(tmp_path, monkeypatch, capsys):
    """Runs `megamask explain` beside small configs; returns exit code, stdout, stderr."""
    write_configs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main(["explain", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_key_is_explained_for_a_person(explain):
    code, out, _ = explain("training.micro_batch_size")
    assert code == 0
    assert out.splitlines() == [
        "training.micro_batch_size",
        "  samples of one forward pass of a data-parallel rank; a step accumulates the gradients of global_batch_size "
        "/ (data_parallel_size * micro_batch_size) passes, and how many changes neither loss nor weights",
        "  type     int",
        "  unit     samples",
        "  allowed  an integer >= 1",
        "  default  1",
        "  kind     operational: may change with every attempt",
        "  used by  megamask train",
    ]


def test_config_adds_value_and_who_set_it(explain):
    assert explain("training.steps", "run.yaml")[1].splitlines()[-2:] == ["  value    20", "  set by   run.yaml:11"]
    assert explain("training.steps", "run.yaml", "training.steps=9")[1].splitlines()[-1] == "  set by   override"
    assert explain("training.stop_after_step", "run.yaml")[1].splitlines()[-2:] == [
        "  value    null",
        "  set by   default",
    ]


def test_required_key_has_no_default(explain):
    assert "  default  none, the key must be given" in explain("training.steps")[1]


def test_section_is_listed_a_line_a_key(explain):
    lines = explain("layout", "run.yaml", "layout.data_parallel_size=2")[1].splitlines()
    assert len(lines) == 9
    assert lines[7].split()[:3] == ["layout.data_parallel_size", "2", "(override)"]


def test_config_alone_lists_all_of_its_keys(explain):
    lines = explain("run.yaml", "run.seed=3")[1].splitlines()
    assert any(line.startswith("run.seed ") and " 3 (override) " in line for line in lines)
    assert any(line.startswith("model.num_layers ") and "model.yaml:2" in line for line in lines)
    assert explain("prepare.yaml")[1].startswith("corpus.inputs ")


def test_json_is_one_object(explain):
    answer = json.loads(explain("run.seed", "run.yaml", "--json")[1])
    assert (answer["key"], answer["value"], answer["set_by"], answer["kind"]) == ("run.seed", 1, "default", "identity")
    assert len(json.loads(explain("--json")[1])["settings"]) > 40


def test_unknown_key_ends_with_2_and_the_nearest(explain):
    code, out, err = explain("objective.noise_shedule")
    assert code == 2
    assert out == ""
    assert err == "error: unknown key objective.noise_shedule\nhint: did you mean objective.noise_schedule?\n"
