from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.checkpoint.contents import TrainerState, read_model, read_state
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.laws import LAWS
from megamask.storage.hashing import canonical_json
from support.model_documents import model_document

STATE = TrainerState(
    step=20, consumed_samples=160, consumed_tokens=5000, seed=2**64 - 1, schedule={"training_steps": 20}
)


def _edit(path: Path, **changes: object) -> None:
    changed = json.loads(path.read_bytes()) | changes
    path.write_bytes(canonical_json(changed) if path.name == "state.json" else json.dumps(changed).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state.json").write_bytes(STATE.to_bytes())
    (tmp_path / "model.json").write_bytes(model_document().to_bytes())
    return tmp_path


def test_state_and_model_read_back_exactly(folder: Path) -> None:
    assert read_state(folder) == STATE
    assert read_model(folder) == model_document()


def test_model_document_keeps_real_numbers_to_the_last_bit(tmp_path: Path) -> None:
    spec = replace(model_document().spec, rope_theta=500_000.1, norm_eps=1e-6, init_std=0.1 + 0.2)
    (tmp_path / "model.json").write_bytes(model_document(spec=spec).to_bytes())
    assert read_model(tmp_path).spec == spec


def test_model_document_says_what_a_stranger_needs() -> None:
    document = json.loads(model_document().to_bytes())
    assert document["format"] == "megamask-model"
    assert document["shift"] is False
    assert (document["vocabulary_size"], document["padded_vocabulary_size"]) == (26, 128)
    assert [document[f"{name}_token_id"] for name in ("eod", "pad", "mask")] == [23, 24, 25]
    assert document["objective"]["mask_logit"] == "excluded"
    assert document["laws"] == LAWS


@pytest.mark.parametrize("name", ["state.json", "model.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff"])
def test_damaged_document_is_refused(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointIntegrityError, match=name):
        (read_state if name == "state.json" else read_model)(folder)


@pytest.mark.parametrize("name", ["state.json", "model.json"])
def test_newer_document_is_a_usage_error(folder: Path, name: str) -> None:
    _edit(folder / name, version=2)
    with pytest.raises(UsageError, match="version 2"):
        (read_state if name == "state.json" else read_model)(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"laws": LAWS | {"noise": 2}}, UsageError),
        ({"shift": True}, CheckpointIntegrityError),
        ({"objective": {}}, CheckpointIntegrityError),
        ({"model": {"num_layers": 2}}, CheckpointIntegrityError),
    ],
)
def test_model_of_other_laws_or_shape_is_refused(
    folder: Path, changes: dict[str, object], error: type[Exception]
) -> None:
    _edit(folder / "model.json", **changes)
    with pytest.raises(error):
        read_model(folder)


@pytest.mark.parametrize("changes", [{"step": "x"}, {"schedule": None}, {"consumed_samples": None}])
def test_state_with_a_misstated_field_is_refused(folder: Path, changes: dict[str, object]) -> None:
    _edit(folder / "state.json", **changes)
    with pytest.raises(CheckpointIntegrityError):
        read_state(folder)
