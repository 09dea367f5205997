"""A run that starts from a published mixture of experts: converted, trained on two layouts, evaluated, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask.conversion.importing import read_published
from megamask.evaluation.request import EvaluationRequest
from megamask.models.shapes import canonical_shapes
from megamask_pipelines.convert import to_hub
from megamask_pipelines.evaluate import evaluate
from support.command import megamask, step_lines, tiny
from support.hub_models import LLADA2, causal_logits, save_hub_folder

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

STEPS = ("training.steps=3", "checkpoint.every_steps=3", "initialise.mask_row=mean")
SIZE = 299  # one row less than the corpus has ids: the mask token's row is new


def _section(model: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"model.{name}={json.dumps(value).strip(chr(34))}" for name, value in model.items())


_SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3_moe", "llada_moe")]


@pytest.mark.parametrize("family", [LLADA2, "rnd1", *_SLOW])
@pytest.mark.promise("A published mixture of experts converts, evaluates, trains on two layouts alike, and exports")
def test_published_experts_train(tmp_path: Path, small_corpus: Path, family: str) -> None:
    options = {"is_merged": True} if family == LLADA2 else {}
    model = save_hub_folder(tmp_path / "hf", family, vocab_size=SIZE, **options)
    done = megamask("convert", "from-hf", tmp_path / "hf", tmp_path / "imported", "--json")
    assert done.code == 0, done.stderr
    assert _nats(tmp_path / "imported", tmp_path) == pytest.approx(_expected_nats(model), rel=1e-6)
    objective = ("objective.name=block", "objective.block_size=8") if family == LLADA2 else ()
    if family == "qwen3_moe":  # an autoregressive source: its shift is kept
        objective = ("objective.complementary=false", "initialise.attention_annealing_steps=2")
    losses = {}
    for name, source, layout in (
        ("one", tmp_path / "imported", ()),
        ("two", f"hf:{tmp_path / 'hf'}", ("layout.expert_parallel_size=2", "layout.data_parallel_size=2")),
    ):
        arguments = tiny(small_corpus, tmp_path, name, f"initialise.source={source}", *objective, *STEPS, *layout)
        trained = megamask("train", *arguments, *_section(done.json["model"]), "--json")
        assert trained.code == 0, trained.stderr
        losses[name] = [line["loss"] for line in step_lines(tmp_path / name).values()]
    assert len(losses["one"]) == 3
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    if family == "rnd1":  # a pair with a shift: first tokens are in neither view
        checked = megamask("verify", "run", tmp_path / "one", "--json")
        assert checked.code == 0, checked.stdout
    to_hub(tmp_path / "one", tmp_path / "out", family_name=family if family in (LLADA2, "llada_moe") else "qwen3_moe")
    before, after = read_published(tmp_path / "hf"), read_published(tmp_path / "out")
    for name in canonical_shapes(before.names.spec):
        one, other = before.canonical(name), after.canonical(name)
        assert not torch.equal(one, other[: len(one)]), name


ROWS = np.random.default_rng(0).integers(0, SIZE, (2, 32))


def _nats(checkpoint: Path, folder: Path) -> float:
    np.save(folder / "rows.npy", ROWS)
    request = EvaluationRequest(token_ids=folder / "rows.npy", objective="autoregressive")
    return float(evaluate(checkpoint, request)["nelbo_nats_per_token"])


def _expected_nats(model: Any) -> float:
    tokens = torch.from_numpy(ROWS)
    logits = causal_logits(model, tokens)[:, :-1].flatten(0, 1).double()
    return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
