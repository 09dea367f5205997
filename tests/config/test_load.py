from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megamask.config.load import load_prepare_config, load_train_config
from support.config_files import RUN, write_configs


def test_layers_lay_the_file_over_its_defaults_in_their_order(train):
    Path("first.yaml").write_text("training: {steps: 1, micro_batch_size: 4}\nrun: {seed: 7}\n")
    Path("second.yaml").write_text("training: {steps: 2}\n")
    Path("run.yaml").write_text("defaults: [first.yaml, second.yaml, model.yaml]\n" + RUN.split("- model.yaml\n")[1])
    config = train().config
    assert config.training.steps == 20  # the file itself
    assert config.training.micro_batch_size == 4  # survives from the first layer
    assert config.run.seed == 7


@pytest.mark.promise("a later file wins over an earlier one")
def test_defaults_later_file_wins_over_earlier(train):
    Path("first.yaml").write_text("run: {seed: 1}\n")
    Path("second.yaml").write_text("run: {seed: 2}\n")
    Path("run.yaml").write_text("defaults: [model.yaml, first.yaml, second.yaml]\n" + RUN.split("- model.yaml\n")[1])
    assert train().config.run.seed == 2


def test_defaults_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    write_configs(tmp_path / "model")
    (tmp_path / "run" / "run.yaml").write_text(RUN.replace("model.yaml", "../model/model.yaml"))
    loaded = load_train_config("run/run.yaml")
    assert loaded.sources == ("model/model.yaml", "run/run.yaml")
    assert loaded.origins["model.num_layers"] == "model/model.yaml:2"


@pytest.mark.promise("each setting knows the file and line that set it")
def test_origins_name_file_and_line_override_or_default(train):
    origins = train("training.micro_batch_size=2", "data.corpora.main=elsewhere").origins
    assert origins["training.steps"] == "run.yaml:11"
    assert origins["model.hidden_size"] == "model.yaml:3"
    assert origins["training.micro_batch_size"] == "override"
    assert origins["data.corpora.main"] == "override"
    assert origins["layout.tensor_parallel_size"] == "default"


def test_overrides_later_one_wins(train):
    assert train("training.steps=3", "training.steps=5").config.training.steps == 5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.learning_rate='2e-4'", "optimizer.learning_rate", 2e-4),
        ("objective.complementary=false", "objective.complementary", False),
        ("training.stop_after_step=null", "training.stop_after_step", None),
        ("training={steps: 4, micro_batch_size: 2}", "training.steps", 4),
        ("run.name=170", "run.name", "170"),
        ("run.name='170'", "run.name", "170"),
        ("run.output_dir=/a b: c #d", "run.output_dir", "/a b: c #d"),
        ("run.output_dir=a=b", "run.output_dir", "a=b"),
        ("tracking.mlflow.uri=null", "tracking.mlflow.uri", None),
        ("tracking.mlflow.uri=", "tracking.mlflow.uri", None),
        ("tracking.mlflow.uri=env:MY_URI", "tracking.mlflow.uri", "env:MY_URI"),
        ("run.seed=18446744073709551615", "run.seed", 2**64 - 1),
    ],
)
def test_override_is_read_as_its_key_needs(train, override, key, value):
    found = train(override).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_corpora_entries_merge_and_null_takes_one_away(train):
    assert train("data.corpora.b=x y").config.data.corpora == {"main": "corpora/main", "b": "x y"}
    assert train("data.corpora.b=x", "data.corpora.main=null").config.data.corpora == {"b": "x"}


def test_list_override_is_a_yaml_list(tmp_path):
    write_configs(tmp_path)
    loaded = load_prepare_config(tmp_path / "prepare.yaml", ["corpus.inputs=[a.txt, '*.md']"])
    assert loaded.config.corpus.inputs == ["a.txt", "*.md"]


REFUSED = {
    "objective.noise_shedule=x": ("unknown key objective.noise_shedule", "did you mean objective.noise_schedule?"),
    "model.tensor_parallel_size=2": ("unknown key", "did you mean layout.tensor_parallel_size?"),
    "objectiv.complementary=true": ("unknown key objectiv.complementary", "did you mean objective.complementary?"),
    "corpus.inputs=[a]": ("unknown key corpus.inputs", "belongs to a config of `megamask prepare`"),
    "training.steps=ten": ("training.steps is 'ten' (a string); allowed: an integer >= 1", ""),
    "training.steps=2.0": ("training.steps is 2.0 (a number); allowed: an integer >= 1", ""),
    "training.steps=1e3": ("training.steps is 1000.0 (a number)", ""),
    "training.steps=true": ("training.steps is true (a boolean)", ""),
    "training.steps=010": ("training.steps is '010' (a string)", ""),
    "training.steps=": ("training.steps is null (no value)", ""),
    "training.steps=0": ("training.steps is 0; allowed: an integer >= 1", ""),
    "run.seed=18446744073709551616": ("allowed: an integer >= 0 and <= 18446744073709551615", ""),
    "optimizer.learning_rate=0": ("optimizer.learning_rate is 0.0; allowed: a number > 0", ""),
    "optimizer.learning_rate=.nan": ("optimizer.learning_rate is nan", "only finite numbers"),
    "optimizer.learning_rate=1e999": ("optimizer.learning_rate is inf", "only finite numbers"),
    "optimizer.learning_rate=true": ("optimizer.learning_rate is true (a boolean)", ""),
    "optimizer.beta1=1": ("allowed: a number >= 0 and < 1", ""),
    "objective.complementary=1": ("objective.complementary is 1 (an integer); allowed: true or false, or null", ""),
    "objective.complementary=no": ("objective.complementary is 'no' (a string)", ""),
    "objective.noise_schedule=quadratic": ("allowed: linear, cosine_md4, cosine_bd3", ""),
    "run.name=..": ("run.name is '..'", ""),
    "run.name=a/b": ("run.name is 'a/b'", ""),
    "run.name=": ("run.name is ''", ""),
    "data.corpora=x": ("data.corpora is 'x' (a string); allowed: a mapping", "{main: folder}"),
    "data.corpora.a/b=x": ("'a/b' is not a name", ""),
    "data.corpora.other=null": ("no earlier layer set it", ""),
    "data.corpora.main=null": ("does not set data.corpora", ""),
    "model=3": ("model is a section, not a value", "its keys: model.num_layers"),
    "training.steps": ("'training.steps' is not an override; allowed: key.path=value", ""),
    "training.steps=!!int 3": ("the tag", ""),
    "training.steps=[1": ("not valid YAML", ""),
    "training.steps=${STEPS}": ("training.steps is '${STEPS}' (a string)", ""),
    "run.output_dir=${HOME}/x": ("the only reference in a path is ${paths.NAME}", "environment variables"),
    "run.output_dir=": ("run.output_dir is '', which names no folder or file; allowed: a path", ""),
    "Training.Steps=3": ("unknown key Training.Steps", "did you mean training.steps?"),
    "MODEL.HIDDEN_SIZE=3": ("unknown key MODEL.HIDDEN_SIZE", "did you mean model.hidden_size?"),
    "training.global-batch-size=3": ("unknown key", "did you mean training.global_batch_size?"),
}


@pytest.mark.promise("a wrong key, type or value is refused with file and line")
@pytest.mark.parametrize("override", REFUSED)
def test_override_is_refused_with_its_reason(train, refusal, override):
    message, hint = REFUSED[override]
    error = refusal(train, override)
    assert message in error.message
    assert hint in (error.hint or "")


FILES_REFUSED = {
    "training:\n  steps: ten\n": "training.steps is 'ten' (a string); allowed: an integer >= 1 (bad.yaml:2)",
    "training:\n  stepps: 3\n": "unknown key training.stepps (bad.yaml:2)",
    "run:\n  name: 170\n": "run.name is 170 (an integer)",
    "training.steps: 3\n": "unknown key training.steps (bad.yaml:1)",
    "run:\n  seed: 1\n  seed: 2\n": "bad.yaml:3: the key seed is given twice, first in line 2",
    "run: &a\n  seed: 1\n": "bad.yaml:1: the anchor &a is not supported",
    "run:\n  name: *b\n": "bad.yaml:2: the alias *b is not supported",
    "run:\n  <<: {seed: 1}\n": "bad.yaml:2: the merge key << is not supported",
    "run:\n  seed: !!int 3\n": "bad.yaml:2: the tag tag:yaml.org,2002:int is not supported",
    "run:\n  name: ${oc.env:HOME}\n": "run.name is '${oc.env:HOME}'; allowed: 1 to 100 of",
    "run: {seed: 1\n": "not valid YAML",
    "run:\n\tseed: 1\n": "bad.yaml:2: not valid YAML",
    "a: 1\n---\nb: 2\n": "a second document begins",
    "- a\n": "bad.yaml:1: a config is a mapping of sections",
    "run: [1]\n": "run is a section, not a value (bad.yaml:1)",
    "defaults: model.yaml\n": "defaults is a list of files (bad.yaml:1)",
    "defaults: [3]\n": "defaults is a list of files (bad.yaml:1)",
    "defaults: [no.yaml]\n": "cannot read the config no.yaml (named in bad.yaml:1): No such file",
    "defaults: [bad.yaml]\n": "bad.yaml is among its own defaults (bad.yaml:1)",
    "? [a]\n: 1\n": "a list or mapping where a key is expected",
    "run: " + "[" * 40 + "]" * 40: "nested deeper than",
    "run: \x01": "not valid YAML",
    'run:\n  output_dir: "a\\0b"\n': "run.output_dir holds a NUL character (bad.yaml:2)",
}


@pytest.mark.promise("a wrong key, type or value is refused with file and line")
@pytest.mark.parametrize("text", FILES_REFUSED)
def test_file_is_refused_with_file_and_line(tmp_path, monkeypatch, refusal, text):
    write_configs(tmp_path, bad=text)
    monkeypatch.chdir(tmp_path)
    assert FILES_REFUSED[text] in refusal(load_train_config, "bad.yaml").message


def test_number_as_a_name_says_how_to_quote_it(tmp_path, refusal):
    write_configs(tmp_path, bad="run:\n  name: 1e3\n")
    assert refusal(load_train_config, tmp_path / "bad.yaml").hint == 'quote it: "1e3"'


def test_dotted_key_in_a_file_says_to_nest_it(tmp_path, refusal):
    write_configs(tmp_path, bad="training.steps: 3\n")
    assert "keys are nested" in refusal(load_train_config, tmp_path / "bad.yaml").hint


def test_mistake_in_a_layer_is_an_error_even_when_overridden(tmp_path, refusal):
    path = write_configs(tmp_path, model="model: {num_layers: two}\n")
    assert "model.num_layers is 'two'" in refusal(load_train_config, path, ["model.num_layers=2"]).message


def test_longer_cycle_of_defaults_is_refused(tmp_path, refusal):
    write_configs(tmp_path, a="defaults: [b.yaml]\n", b="defaults: [a.yaml]\n")
    assert "among its own defaults" in refusal(load_train_config, tmp_path / "a.yaml").message


def test_same_layer_twice_on_different_branches_is_no_cycle(tmp_path):
    path = write_configs(
        tmp_path, left="defaults: [model.yaml]\n", run=RUN.replace("- model.yaml", "- left.yaml\n  - model.yaml")
    )
    assert load_train_config(path).config.model.num_layers == 2


def test_missing_keys_are_named_with_their_meaning(tmp_path, refusal):
    write_configs(tmp_path, empty="", partial="model:\n  # all comments\n")
    for name in ("empty", "partial"):
        error = refusal(load_train_config, tmp_path / f"{name}.yaml")
        assert "model.num_layers (transformer layers; an integer >= 1)" in error.message
        assert "training.steps" in error.message
        assert "megamask train" in error.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_unreadable_file_is_a_usage_error(tmp_path, refusal, content):
    path = tmp_path / "x.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert str(path) in refusal(load_train_config, path).message


def test_train_file_given_to_prepare_says_where_it_belongs(tmp_path, refusal):
    path = write_configs(tmp_path)
    assert "`megamask train`" in refusal(load_prepare_config, path).hint


def test_config_imports_no_torch_and_omegaconf_only_to_load():
    names = ["dump", "identity", "keys", "secrets", "schema.roots", "paths", "lines"]
    code = "import sys\n" + "".join(f"import megamask.config.{name}\n" for name in names)
    found = "print(sorted({'torch', 'omegaconf', 'numpy', 'mlflow'} & set(sys.modules)))\n"
    code += found + "import megamask.config.explain, megamask.config.validate\n" + found
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["[]", "['omegaconf']"], done.stderr
