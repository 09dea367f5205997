from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamask.config.identity import compare_identity, identity_fields
from megamask.config.load import load_prepare_config, load_train_config
from support.config_files import write_configs


@pytest.mark.promise("a reference to `paths` is resolved in every path")
def test_reference_is_resolved_in_every_kind_of_path(tmp_path):
    write_configs(tmp_path)
    paths = ["paths.base=/data", "paths.corpora=${paths.base}/corpora"]
    config = load_train_config(
        tmp_path / "run.yaml", [*paths, "data.corpora.main=${paths.corpora}/main", "run.output_dir=${paths.base}"]
    ).config
    assert config.paths == {"base": "/data", "corpora": "/data/corpora"}
    assert config.data.corpora == {"main": "/data/corpora/main"}
    assert config.run.output_dir == "/data"
    corpus = load_prepare_config(
        tmp_path / "prepare.yaml", [*paths, "corpus.inputs=['${paths.base}/*.txt', b]", "corpus.tokenizer.path=null"]
    ).config.corpus
    assert corpus.inputs == ["/data/*.txt", "b"]


def test_reference_follows_a_later_layer_and_identity_compares_the_resolved_values(train):
    Path("site.yaml").write_text("paths: {base: /a}\ndata: {corpora: {main: '${paths.base}/main'}}\n")
    Path("run.yaml").write_text("defaults: [site.yaml]\n" + Path("run.yaml").read_text().replace("defaults:\n  -", "#"))
    write_configs(Path(), run="defaults: [model.yaml, site.yaml]\nrun: {name: r}\noptimizer: {learning_rate: 1}\n"
                  "training: {steps: 2, global_batch_size: 2, sequence_length: 16}\n")  # fmt: skip
    loaded = train("paths.base=/b")
    assert loaded.config.data.corpora["main"] == "/b/main"
    assert loaded.origins["data.corpora.main"] == "site.yaml:2"
    assert loaded.origins["paths.base"] == "override"
    compare_identity(identity_fields(train().config), loaded.config)


characters = st.characters(codec="utf-8", exclude_characters="\0$~@:")


@given(before=st.text(characters), name=st.from_regex(r"\A[A-Za-z0-9_-]{1,9}\Z"), value=st.text(characters, min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reference_is_its_value_between_what_surrounds_it(tmp_path, before, name, value):
    path = write_configs(tmp_path)
    text = f"{before}${{paths.{name}}}'\\ {before}"
    override = 'run.output_dir="' + "".join(f"\\U{ord(letter):08X}" for letter in text) + '"'
    given_path = f'paths.{name}="' + "".join(f"\\U{ord(letter):08X}" for letter in value) + '"'
    assert load_train_config(path, [given_path, override]).config.run.output_dir == f"{before}{value}'\\ {before}"


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (
            ["paths.corpora=/c", "data.corpora.main=${paths.corpra}/x"],
            "data.corpora.main refers to paths.corpra, which is not set (override)",
            "did you mean paths.corpora?",
        ),
        (["run.output_dir=${paths.base}"], "run.output_dir refers to paths.base, which is not set", "set paths.base"),
        (["paths.a=${paths.b}", "paths.b=${paths.a}"], "paths.a refers to paths.b, which refers to itself", ""),
        (["paths.a=x", "run.output_dir=${paths.a.b}"], "the only reference in a path is ${paths.NAME}", ""),
        (["paths.a=x", "run.output_dir=${.a}"], "the only reference in a path is ${paths.NAME}", ""),
        (["run.output_dir=~no_such_user/x"], "there is no such home folder", "write ./~..."),
        (["run.output_dir=$HOME/runs"], "environment variables are not read from a config (on the command line)", "~"),
        (["data.corpora.main=''"], "data.corpora.main is '', which names no folder or file", ""),
    ],
)
def test_path_is_refused_with_its_reason(train, refusal, overrides, message, hint):
    error = refusal(train, *overrides)
    assert message in error.message
    assert error.message.endswith("Nothing was started.")
    assert hint in (error.hint or "")


@pytest.mark.promise("`~` is expanded in every path, `$NAME` is refused")
def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/h/me")
    write_configs(tmp_path)
    config = load_train_config(
        tmp_path / "run.yaml", ["run.output_dir=~/runs", "data.corpora.main=~", "paths.a=~/a"]
    ).config
    assert (config.run.output_dir, config.data.corpora["main"], config.paths["a"]) == (
        "/h/me/runs", "/h/me", "/h/me/a",
    )  # fmt: skip
    corpus = load_prepare_config(
        tmp_path / "prepare.yaml",
        [
            "corpus.inputs=[~/a.txt, {path: ~/b, licence: '~${x}'}]",
            "corpus.output_dir=~/c",
            "corpus.tokenizer.path=~/t.json",
        ],
    ).config.corpus
    assert corpus.inputs == ["/h/me/a.txt", {"path": "/h/me/b", "licence": "~${x}"}]
    assert (corpus.output_dir, corpus.tokenizer.path) == ("/h/me/c", "/h/me/t.json")
