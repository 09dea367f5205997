"""Hostile configs: each is refused with 2, names what is not allowed and where, runs nothing and reads no variable."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.load import load_train_config
from megamask.config.secrets import carries_credential
from megamask.errors import UsageError
from megamask.provenance.redaction import redact
from megamask_pipelines.cli import main as cli
from support.command import TINY, command, environment
from support.config_files import write_configs

SECRET = "hunter2hunter2"


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `megamask train` on a config that must be refused; nothing may appear beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", SECRET)

    def run(text: str | bytes, *words: str, overrides: tuple[str, ...] = ()) -> str:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "bad.yaml").write_bytes(data)
        assert cli.main(["train", "bad.yaml", *overrides, "--json"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.splitlines()[0].endswith("Nothing was started."), error
        assert "Traceback" not in error
        assert SECRET not in error
        for word in words:
            assert word in error
        assert {path.name for path in tmp_path.iterdir()} <= {"bad.yaml", "more.yaml"}
        return error

    return run


@pytest.mark.promise(
    "a config with tags, anchors, aliases, merge keys, duplicate keys or a second document is refused with its line"
)
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/object/new:os.system ['touch canary']",
        "!!python/name:os.system ''",
        "!!python/module:subprocess ''",
        "!!binary aGVsbG8=",
        "!!int '1'",
        "!!str x",
        "!env HOME",
        "!include /etc/passwd",
        "! x",
        "!<tag:yaml.org,2002:python/name:os.system> x",
    ],
)
def test_tag_is_refused_with_its_line_and_calls_nothing(refuse, tmp_path: Path, value: str) -> None:
    refuse(f"run:\n  name: {value}\n", "bad.yaml:2: the tag", "is not supported")
    assert not (tmp_path / "canary").exists()


def test_tag_behind_a_directive_is_refused(refuse) -> None:
    refuse("%TAG ! tag:yaml.org,2002:python/\n---\nrun: !name:os.system x\n", "bad.yaml:3: the tag")


@pytest.mark.promise(
    "a config with tags, anchors, aliases, merge keys, duplicate keys or a second document is refused with its line"
)
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("run: &a {name: x}\n", "bad.yaml:1: the anchor &a"),
        ("run:\n  name: &a x\n", "bad.yaml:2: the anchor &a"),
        ("run: {name: x}\nmodel: *a\n", "bad.yaml:2: the alias *a"),
        ("run:\n  <<: {name: x}\n", "bad.yaml:2: the merge key <<"),
        ("base: &base {name: x}\nrun:\n  <<: *base\n", "bad.yaml:1: the anchor &base"),
        ("run:\n  name: x\n  name: y\n", "bad.yaml:3: the key name is given twice, first in line 2"),
        ("run: {name: x}\n---\nrun: {name: y}\n", "bad.yaml:2: a second document begins"),
        ("? [a, b]\n: 1\n", "bad.yaml:1: a list or mapping where a key is expected"),
        ("run:\n\tname: x\n", "bad.yaml:2: not valid YAML"),
        ('run: {name: "\\U00110000"}\n', "bad.yaml:1: not valid YAML"),
        ('run: {name: "\x01"}\n', "bad.yaml:1: not valid YAML: special characters"),
    ],
)
def test_what_hides_a_value_from_its_line_is_refused_there(refuse, text: str, where: str) -> None:
    refuse(text, where)


def test_billion_laughs_are_refused_at_the_first_anchor(refuse) -> None:
    lines = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    refuse("\n".join(lines), "bad.yaml:1: the anchor &a")


@pytest.mark.promise("a config reads environment variables through references only")
@pytest.mark.parametrize("value", ["${oc.env:CANARY}", "${CANARY}", "x${env:CANARY}y", "${oc.decode:1}", "${run.seed}"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_reference_to_anything_but_paths_is_refused_and_reads_no_variable(refuse, value: str, quote: str) -> None:
    words = ("run.output_dir is ", "the only reference in a path is ${paths.NAME}")
    refuse(f"run:\n  output_dir: {quote}{value}{quote}\n", *words, "bad.yaml:2")
    refuse(f"paths:\n  a: {quote}{value}{quote}\n", "paths.a is ", words[1], "bad.yaml:2")
    refuse("run:\n", *words, "on the command line", overrides=(f"run.output_dir={value}",))


@pytest.mark.parametrize(
    "value", ["${oc.env:CANARY}", "${run.seed}", "${paths.a}", "${", "${}}", "$CANARY", "???", "\\"]
)
def test_string_that_is_not_a_path_keeps_every_sign(tmp_path: Path, value: str) -> None:
    path = write_configs(tmp_path)
    overrides = ["paths.a=b", f"preview.prompts=['{value}','x{value}']", f"tracking.mlflow.experiment={value}"]
    config = load_train_config(path, overrides).config
    assert config.preview.prompts == [value, f"x{value}"]
    assert config.tracking.mlflow.experiment == value


@pytest.mark.parametrize("text", ["$CANARY", "$CANARY/x", "a/$HOME", "a$b"])
def test_variable_in_a_path_is_refused(refuse, text: str) -> None:
    refuse(f"run:\n  output_dir: {text}\n", "run.output_dir is ", "environment variables are not read", "bad.yaml:2")


@pytest.mark.parametrize("text", ["%CANARY%", "$(id)", "`id`", "{{CANARY}}", "a~", "$1", "???", "a\\b"])
def test_other_signs_are_plain_characters_of_a_path(tmp_path: Path, text: str) -> None:
    config = load_train_config(write_configs(tmp_path), [f"run.output_dir={text}"]).config
    assert config.run.output_dir == text


@pytest.mark.parametrize(
    "text",
    [
        "run: " + "[" * 100_000,
        "run: " + "{a: " * 5_000,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        "- " * 50_000,
    ],
    ids=["lists", "mappings", "blocks", "dashes"],
)
def test_deep_nesting_is_refused(refuse, text: str) -> None:
    refuse(text, "nested deeper than 16 levels")


def test_file_larger_than_any_config_is_refused_unparsed(refuse) -> None:
    refuse("run: {name: " + "x" * (1 << 20) + "}", "bad.yaml is larger than 1048576 bytes")


def test_long_value_is_refused_by_its_beginning(refuse) -> None:
    error = refuse("run:\n  name: " + "x" * 300_000 + "\n", "run.name is 'xxx", "(300000 characters)", "bad.yaml:2")
    assert len(error) < 2000


@pytest.mark.promise("deep, huge, endless and doubling configs are refused in little time and memory")
@pytest.mark.multiprocess
def test_endless_file_is_refused_within_the_memory_of_a_small_process(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run(
        command("explain", "run.name", "/dev/zero"),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        cwd=tmp_path,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 2
    assert "/dev/zero is larger than" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"run: {name: caf\xe9}\n", ("bad.yaml is not UTF-8 text",)),
        ("run: {name: x}\n".encode("utf-16"), ("bad.yaml is not UTF-8 text",)),
        (b'run: {output_dir: "\\ud800"}\n', ("run.output_dir is not Unicode text", "bad.yaml:1")),
        (b'run: {output_dir: "a\\0b"}\n', ("run.output_dir holds a NUL character", "bad.yaml:1")),
    ],
)
def test_text_that_no_file_system_takes_is_refused(refuse, text: bytes, words: tuple[str, ...]) -> None:
    refuse(text, *words)


@pytest.mark.parametrize(
    "value", ["017", "0o17", "0x10", "1_000", "1:30", "2001-01-01", "true", "yes", "~", "1e3", "+-1"]
)
def test_scalar_that_yaml_versions_read_differently_is_no_integer(refuse, value: str) -> None:
    refuse(f"training:\n  steps: {value}\n", "training.steps is ", "an integer >= 1", "bad.yaml:2")


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "y", "1", "'true'", "null"])
def test_scalar_that_yaml_versions_read_differently_is_no_boolean(refuse, value: str) -> None:
    refuse(f"model:\n  qk_norm: {value}\n", "model.qk_norm is ", "true or false", "bad.yaml:2")


@pytest.mark.parametrize("value", ["'${CANARY}/x.yaml'", "env:CANARY", "https://host/x.yaml", "/dev/null/x", "."])
def test_default_that_is_no_file_is_refused_with_the_line_that_names_it(refuse, value: str) -> None:
    refuse(f"run: {{name: x}}\ndefaults:\n  - {value}\n", "bad.yaml:3")


def test_default_of_somebody_else_is_not_quoted(refuse, tmp_path: Path) -> None:
    """A config may name any file that its reader may read; what is not a config is refused without its content."""
    (tmp_path / "more.yaml").write_text(f"root:x:0:0:{SECRET}:/bin/sh\n")
    refuse("defaults: [more.yaml]\n", "more.yaml:1: a config is a mapping of sections")


@pytest.mark.promise("deep, huge, endless and doubling configs are refused in little time and memory")
def test_defaults_that_double_are_refused_soon(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"defaults: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("")
    with pytest.raises(UsageError, match="are more than 100 files"):
        load_train_config(tmp_path / "0.yaml")


def test_defaults_that_meet_themselves_are_refused(refuse) -> None:
    refuse("defaults: [./bad.yaml]\n", "is among its own defaults (bad.yaml:1)")


# Secrets are in the environment, never in a config.

SHAPES = [
    "hf_" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "glpat-" + "a1B2" * 5,
    "AKIA" + "A1B2" * 4,
    "sk-proj-" + "a1-B" * 8,
    "sk-" + "a1B2" * 10,
    "xoxb-" + "1234567890-abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
]
URIS = [
    f"https://me:{SECRET}@host/x",
    f"https://{SECRET}@host/x",
    f"https://me:{SECRET}/a@host/x",
    f"https://me:{SECRET} x@host",
    f"https://me:a'b{SECRET}@host",
    f"https://host/x?token={SECRET}",
    f"https://host/x?%74oken={SECRET}",
    f"https://host/x?a=1&X-Amz-Signature={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"postgresql+psycopg2://me:{SECRET}@db/mlflow",
    f"HTTPS://ME:{SECRET}@HOST",
]


@pytest.mark.promise("a credential in a config or an override is refused and never shown")
@pytest.mark.parametrize("value", [*SHAPES, *(f"https://host/{shape}/x" for shape in SHAPES[:3]), *URIS])
@pytest.mark.parametrize("key", ["tracking.mlflow.uri", "tracking.mlflow.experiment", "run.output_dir"])
def test_credential_is_refused_in_a_file_and_in_an_override_and_never_shown(refuse, key: str, value: str) -> None:
    secret = next((shape for shape in SHAPES if shape in value), SECRET)
    *sections, name = key.split(".")
    nested = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    text = f'{nested}{"  " * len(sections)}{name}: "{value}"\n'
    error = refuse(text, f"{key} carries a credential (bad.yaml:{len(sections) + 1})")
    assert secret not in error
    assert f"{key}=env:NAME" in error
    error = refuse("", f"{key} carries a credential (on the command line)", overrides=(f"{key}={value}",))
    assert secret not in error


@pytest.mark.parametrize(
    "value",
    [
        "https://host:5000/path@v2?experiment=3",
        "http://[::1]:5000",
        "sqlite:////data/mlflow.db",
        "file:///a@b:c@d",
        "data/sk-learn-experiments-of-2026-and-more",
        "runs/eyJ",
        "s3://bucket/tokens/part-00001",
        "a sentence: with https://host: and a mail to a@b",
    ],
)
def test_plain_value_is_not_taken_for_a_credential(tmp_path: Path, value: str) -> None:
    assert load_train_config(write_configs(tmp_path), [f"run.output_dir={value}"]).config.run.output_dir == value


@given(st.text(alphabet=st.sampled_from("a:/@?#.=-_e%yJsktoken "), max_size=300))
def test_redaction_and_detection_agree_and_end(text: str) -> None:
    once = redact(text)
    assert redact(once) == once
    assert isinstance(carries_credential(text), bool)


@pytest.mark.parametrize("piece", ["a", "a.", "a://b:c", "eyJ", "token", "a:", "-", "sk-proj-", "x=", " ", "a@", "://"])
def test_redaction_of_a_long_text_costs_no_more_than_its_length(piece: str) -> None:
    """Not a time: a pattern that backtracks over this text would not end within the test's limit."""
    text = piece * (400_000 // len(piece))
    carries_credential(text)
    assert len(redact(text)) <= len(text) + 16


@pytest.mark.promise("a config reads environment variables through references only")
def test_environment_is_read_for_references_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a config looks at no variable; a reference is kept as it is."""
    read: list[str] = []

    class Watched(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            read.append(name)
            return super().__getitem__(name)

        def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
            read.append(name)
            return super().get(name, default)

    path = write_configs(tmp_path)
    monkeypatch.setattr(os, "environ", Watched(os.environ))
    config = load_train_config(path, ["tracking.mlflow.uri=env:HOME"]).config
    assert config.tracking.mlflow.uri == "env:HOME"
    assert load_train_config(TINY, [])
    assert set(read) <= {"HOME"}  # of ~ in a path
