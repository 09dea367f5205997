from __future__ import annotations

import pytest

from megamask.config.load import load_train_config
from megamask.config.secrets import carries_credential, resolve_secret, shown
from megamask.errors import UsageError
from support.config_files import write_configs

SHOWN = [
    "https://user:hunter2@host/path",
    "https://hunter2@host",
    "https://host/?token=hunter2",
    "https://host/?a=1&api_key=hunter2",
    "https://host/#access_token=hunter2",
    "postgresql+psycopg2://me:hunter2@db:5432/mlflow",
    "see https://user:hunter2@host for more",
]
PLAIN = [
    "https://host:5000/path?experiment=3",
    "sqlite:////data/mlflow.db",
    "file:///a@b",
    "me@example.org",
    "",
    "a:b@c",
]


@pytest.mark.parametrize("text", SHOWN)
def test_credential_in_a_uri_is_found_and_never_shown(text):
    assert carries_credential(text)
    assert shown(text) == "***"


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_carries_no_credential(text):
    assert not carries_credential(text)
    assert shown(text) == repr(text)


@pytest.mark.promise("a credential in a config is refused and not shown")
@pytest.mark.parametrize("text", SHOWN)
@pytest.mark.parametrize(
    "key", ["tracking.mlflow.uri", "run.output_dir", "training.steps", "data.corpora.main", "layout", "no.such"]
)
def test_credential_in_a_config_is_refused_without_echo(tmp_path, text, key):
    path = write_configs(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_train_config(path, [f"{key}={text}"])
    assert "hunter2" not in str(caught.value)
    if key == "tracking.mlflow.uri":
        write_configs(tmp_path, bad=f'tracking:\n  mlflow:\n    uri: "{text}"\n')
        with pytest.raises(UsageError, match=r"tracking\.mlflow\.uri carries a credential \(.*bad\.yaml:3\)") as caught:
            load_train_config(tmp_path / "bad.yaml")
        assert "hunter2" not in str(caught.value)


def test_override_without_a_sign_is_not_echoed_when_it_shows_a_credential(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_train_config(write_configs(tmp_path), ["https://user:hunter2@host"])
    assert "hunter2" not in str(caught.value)


def test_reference_is_stored_unresolved_and_resolved_at_use(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_URI", "https://user:hunter2@host")
    config = load_train_config(write_configs(tmp_path), ["tracking.mlflow.uri=env:MY_URI"]).config
    assert config.tracking.mlflow.uri == "env:MY_URI"
    assert resolve_secret("tracking.mlflow.uri", config.tracking.mlflow.uri) == "https://user:hunter2@host"


def test_value_that_is_no_reference_is_itself():
    assert resolve_secret("tracking.mlflow.uri", "http://host") == "http://host"


@pytest.mark.parametrize("content", [None, ""])
def test_reference_to_a_variable_that_is_not_set_is_refused(monkeypatch, content):
    monkeypatch.delenv("MY_URI", raising=False) if content is None else monkeypatch.setenv("MY_URI", content)
    with pytest.raises(UsageError, match=r"the environment variable MY_URI is not set") as caught:
        resolve_secret("tracking.mlflow.uri", "env:MY_URI")
    assert "tracking.mlflow.uri" in caught.value.hint


@pytest.mark.parametrize("reference", ["env:", "env:MY URI", "env:1A", "env:https://user:hunter2@host"])
def test_reference_without_a_proper_name_is_refused(tmp_path, reference):
    with pytest.raises(UsageError) as caught:
        load_train_config(write_configs(tmp_path), [f"tracking.mlflow.uri={reference}"])
    assert "tracking.mlflow.uri" in caught.value.message
    assert "hunter2" not in str(caught.value)
