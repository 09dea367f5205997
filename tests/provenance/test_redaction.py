from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.provenance.redaction import forget_secrets, redact, register_environment

SECRET = "pl4nted-S3cret-9f"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@mlflow.example.org/api",
        f"postgresql+psycopg2://mlflow:{SECRET}@db:5432/mlflow",
        f"https://{SECRET}@example.org",
        f"s3://bucket/key?X-Amz-Signature={SECRET}&a=b",
        f"https://h/p?token={SECRET}",
        f"MLFLOW_TRACKING_PASSWORD={SECRET}",
        f'{{"api_key": "{SECRET}"}}',
        f"password: {SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
    ],
)
def test_planted_secret_is_not_shown(text: str) -> None:
    shown = redact(f"before {text} after")
    assert SECRET not in shown
    assert "***" in shown
    assert shown.startswith("before ")
    assert shown.endswith(" after")


@pytest.mark.parametrize("token", ["hf_" + "a1" * 17, "ghp_" + "b2" * 18, "AKIAABCDEFGHIJKLMNOP", "dapi" + "0f" * 16])
def test_known_kinds_of_token_are_not_shown_without_a_name(token: str) -> None:
    assert redact(f"login with {token}.") == "login with ***."


@pytest.mark.parametrize(
    "text",
    [
        "https://mlflow.example.org:5000/api?experiment=3",
        "sqlite:////data/runs/mlflow.db",
        "consumed_tokens=4096 tokens_per_second: 812.5 mask_token_id=511",
        "nelbo_nats_per_token=5.19, tokenizer=data/tokenizer.json",
        "tracking.mlflow.password=env:MLFLOW_PASSWORD",
        "mail somebody@example.org",
        "shards/train-000000.tar: member 000004.tokens.npy: its header, and tokens: 512",
    ],
)
def test_harmless_text_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text(max_size=60))
def test_redaction_happens_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_name_of_a_job_start_is_no_secret_though_its_variable_resembles_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_secrets()
    monkeypatch.setenv("MEGAMASK_LAUNCH_TOKEN", "slurm-4711.0")
    monkeypatch.setenv("SITE_TOKEN", "a-real-secret")
    register_environment()
    assert redact("slurm-4711.0 a-real-secret") == "slurm-4711.0 ***"
    forget_secrets()
