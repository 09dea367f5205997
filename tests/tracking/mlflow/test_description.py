"""The description of a run's page in MLflow, as an auditor reads it."""

from __future__ import annotations

from typing import Any

import pytest

from megamask.config.schema.objective import NAMES
from megamask.tracking.mlflow.description import _KINDS, description_of
from megamask.tracking.mlflow.points import Memory, update_of

RUN = {
    "identity": {
        "model.num_layers": 12,
        "model.hidden_size": 768,
        "training.sequence_length": 1024,
        "objective.name": "masked",
        "objective.noise_schedule": "linear",
        "objective.complementary": True,
        "objective.recipe": None,
    }
}
DATASET = {
    "name": "main",
    "split": "train",
    "corpus_id": "ab" * 32,
    "source": "/corpora/main",
    "rows": 16,
    "tokens": 100,
    "origin": "https://example.org/texts",
    "licence": "CC0 | public domain",
}


def line(kind: str, seq: int, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time": "2026-03-01T12:00:00Z", "kind": kind, "prev": "0" * 64, **fields}


def two_attempts() -> Memory:
    """Memory after two attempts on different layouts, the second one with a better checkpoint."""
    memory = Memory()
    for attempt, (first, ranks, bound, reason) in enumerate(
        [(1, 1, 3.0, "preempted"), (3, 2, 2.5, "all steps are done")], 1
    ):
        name = f"step-{first + 1:08d}-a{attempt:04d}"
        update_of(
            [
                line(
                    "attempt_started",
                    1,
                    attempt=attempt,
                    host=f"node-{attempt}",
                    user="ada",
                    device="cuda",
                    world_size=ranks,
                    layout={"tensor_parallel_size": 1, "data_parallel_size": ranks},
                    num_parameters=123456789,
                    datasets=[DATASET],
                ),
                line("step", 2, step=first, loss=4.0, consumed_tokens=first * 8000),
                line("step", 3, step=first + 1, loss=4.0, consumed_tokens=(first + 1) * 8000),
                line(
                    "checkpoint_committed",
                    4,
                    step=first + 1,
                    checkpoint=name,
                    digest="d",
                    evaluation={"nelbo_nats_per_token": bound, "standard_error": 0.1},
                ),
                line("attempt_ended", 5, attempt=attempt, exit_code=0, step=first + 1, reason=reason),
            ],
            memory,
        )
    return memory


@pytest.mark.promise(
    "the run's page in MLflow answers an auditor: model, corpora, masks, tokens, attempts, best, checks"
)
def test_description_has_model_corpora_masks_tokens_attempts_best_and_checks() -> None:
    text = description_of(RUN, two_attempts())
    paragraph, corpora, attempts, *checks = text.split("\n\n")
    assert "123,456,789 parameters (12 layers, 768 channels, 1024 tokens a row)" in paragraph
    assert "Objective: masked with noise_schedule linear, complementary yes." in paragraph
    assert "32,000 tokens" in paragraph
    assert "Best checkpoint: `step-00000004-a0002`, at most 2.5000 nats per token" in paragraph
    assert corpora.splitlines() == [
        "| corpus | id | origin of its inputs | licence |",
        "| --- | --- | --- | --- |",
        "| main | abababababab | https://example.org/texts | CC0 \\| public domain |",
    ]
    assert attempts.splitlines()[0] == "| attempt | host | user | device | layout | steps | ended |"
    first, second = attempts.splitlines()[2:]
    assert first == "| 1 | node-1 | ada | cuda | 1 process | 1-2 | preempted |"
    assert second == "| 2 | node-2 | ada | cuda | 2 processes, data 2 | 3-4 | all steps are done |"
    assert "megamask verify run RUN --against-mlflow" in "\n".join(checks)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "masked with complementary no, noise_schedule linear, weight nelbo."),
        ({"weight": "cart"}, "masked with cart_p 0.3, complementary no, noise_schedule linear, weight cart."),
        (
            {"noise_schedule": "spindle"},
            "masked with complementary no, noise_schedule spindle, spindle_strength 0.3.",
        ),
        ({"recipe": "mdlm"}, "masked with complementary no, recipe mdlm."),
    ],
)
def test_description_leaves_out_settings_that_are_not_in_force(given: dict[str, Any], words: str) -> None:
    settings = {"name": "masked", "cart_p": 0.3, "complementary": False, "noise_exponent": 1.0}
    settings |= {"noise_schedule": "linear", "recipe": None, "spindle_strength": 0.3, "weight": "nelbo"}
    settings |= {"z_loss_weight": 0.0, "block_schedule": []} | given
    identity = {f"objective.{key}": value for key, value in sorted(settings.items())}
    assert f"Objective: {words}" in description_of({"identity": identity}, Memory())


@pytest.mark.promise(
    "the run's page in MLflow answers an auditor: model, corpora, masks, tokens, attempts, best, checks"
)
def test_description_names_the_objective_and_the_first_weights() -> None:
    memory = two_attempts()
    assert description_of(RUN, memory).startswith("A masked-diffusion language model of")
    assert ", pretrained with megamask." in description_of(RUN, memory)
    identity: dict[str, Any] = {**RUN["identity"], "objective.name": "autoregressive"}
    text = description_of(
        {"identity": identity, "parent_checkpoint": {"source": "hf:llama", "digest": "ab" * 32}}, memory
    )
    assert text.startswith("An autoregressive language model of")
    assert "diffusion" not in text and "at most" not in text
    assert "trained from `hf:llama` (abababababab) with megamask." in text
    assert set(NAMES) == set(_KINDS)
