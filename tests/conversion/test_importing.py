"""Published models as checkpoints: round trip, memory, interruption, refusals."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.checkpoint.contents import read_model
from megamask.checkpoint.origin import read_origin
from megamask.checkpoint.reader import verify_checkpoint
from megamask.checkpoint.state_files import check_state
from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.importing import import_model, read_published
from megamask.data.tokenizer import NO_TOKEN
from megamask.engine.state.restore import canonical_reader
from megamask.errors import DataIntegrityError, UsageError
from megamask.models.families.registry import FAMILIES
from megamask.models.shapes import canonical_shapes
from megamask.models.vocabulary import NO_ID
from megamask_pipelines.convert import to_hub
from support.hub_models import save_hub_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.promise("from-hf and then to-hf gives a published model's tensors back bit for bit, family by family")
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_hub_folder(tmp_path / "in", family, dtype=dtype)
    report = import_model(tmp_path / "checkpoint", read_published(tmp_path / "in"), max_file_bytes=60_000)
    answer = verify_checkpoint(tmp_path / "checkpoint", check_state)
    assert answer["ok"]
    assert len(list((tmp_path / "checkpoint").glob("state-*.safetensors"))) > 1
    origin = read_origin(report.commit)
    assert origin is not None
    assert (origin.family, origin.attention) == (family, FAMILIES[family].attention)
    model = read_model(tmp_path / "checkpoint")
    assert model.to_json()["shift"] is (FAMILIES[family].target_shift and FAMILIES[family].attention != "causal")
    result = to_hub(tmp_path / "checkpoint", tmp_path / "out", family_name=None, number_format=None)
    assert result["family"] == family
    stored, found = _tensors(tmp_path / "in"), _tensors(tmp_path / "out")
    assert set(found) == set(stored) - ({"lm_head.weight"} if family == "illada" else set())
    assert all(torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in found)
    again, source = HubFolder(tmp_path / "out").config, HubFolder(tmp_path / "in").config
    assert FAMILIES[family].spec(again) == FAMILIES[family].spec(source)
    assert again["architectures"] == source["architectures"]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.promise("An import holds one tensor in memory at a time")
@pytest.mark.parametrize("family", ["llama", "llada2_moe"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    save_hub_folder(tmp_path / "in", family, num_hidden_layers=6)
    alive: dict[int, int] = {}
    peaks = []
    original = HubFolder.rectangle

    def counted(self: HubFolder, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> torch.Tensor:
        value = original(self, name, shape, index)
        alive[id(value)] = value.numel()
        weakref.finalize(value, alive.pop, id(value), None)
        peaks.append(sum(alive.values()))
        return value

    monkeypatch.setattr(HubFolder, "rectangle", counted)
    model = read_published(tmp_path / "in")
    import_model(tmp_path / "out", model)
    shapes = canonical_shapes(model.names.spec)
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    assert len(peaks) == 2 * len(shapes)
    assert max(peaks) <= 2 * largest < sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.promise("An interrupted import continues with the first missing file, and its bytes are the same")
def test_an_interrupted_import_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    import_model(tmp_path / "complete", read_published(tmp_path / "in"), max_file_bytes=60_000)
    original, calls = HubFolder.rectangle, []

    def dies(self: HubFolder, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, name, shape, index)

    model = read_published(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(HubFolder, "rectangle", dies)
        with pytest.raises(KeyboardInterrupt):
            import_model(tmp_path / "out", model, max_file_bytes=60_000)
    assert not (tmp_path / "out").exists()
    progress = []
    report = import_model(
        tmp_path / "out", model, max_file_bytes=60_000, on_progress=lambda done, total: progress.append((done, total))
    )
    assert report.resumed_files > 0
    assert progress[-1][0] == progress[-1][1]
    for path in (tmp_path / "complete").rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "complete")).read_bytes() == path.read_bytes()


def test_a_source_that_changed_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    with monkeypatch.context() as patch:
        patch.setattr("megamask.conversion.importing._verify", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_model(tmp_path / "out", read_published(tmp_path / "in"), max_file_bytes=60_000)
    save_hub_folder(tmp_path / "in", "llama", seed=1)
    model = read_published(tmp_path / "in")
    assert import_model(tmp_path / "out", model, max_file_bytes=60_000).resumed_files == 0
    read = canonical_reader(tmp_path / "out", model.names.spec)
    assert torch.equal(read("model.norm.weight"), model.canonical("model.norm.weight"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config))


def _no_rope_base(folder: Path) -> None:
    _edit(folder, rope_theta=None, rope_parameters=None)


def _another_family(folder: Path) -> None:
    _edit(folder, architectures=["GPT2LMHeadModel"])


def _unexpected_tensor(folder: Path) -> None:
    _with_tensor(folder, "model.layers.0.extra.weight", torch.zeros(2))


def _other_shape(folder: Path) -> None:
    _with_tensor(folder, "model.norm.weight", torch.zeros(7))


def _with_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"].get(name, index["weight_map"]["model.norm.weight"])
    save_file(load_file(folder / file) | {name: value}, folder / file, metadata={"format": "pt"})
    index["weight_map"][name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncated(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def _missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _other_ids(folder: Path) -> None:
    _edit(folder, eos_token_id=3)
    added = [{"id": 5, "content": "</s>", "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (_no_rope_base, UsageError, "neither rope_theta nor rope_parameters.rope_theta"),
        (_another_family, UsageError, "GPT2LMHeadModel is not supported, because it has learned positions"),
        (_unexpected_tensor, DataIntegrityError, "not part of this architecture: model.layers.0.extra.weight"),
        (_other_shape, DataIntegrityError, r"model.norm.weight has shape \[7\], config.json asks for \[64\]"),
        (_truncated, DataIntegrityError, "truncated or not a safetensors file"),
        (_missing_shard, DataIntegrityError, "is missing"),
        (_other_ids, UsageError, "eos_token_id is 3 in config.json and 5 in the tokenizer's files"),
    ],
)
@pytest.mark.promise(
    "A published model that is damaged or not understood is refused with one error, and nothing is written"
)
def test_a_folder_that_is_wrong_is_refused(tmp_path: Path, damage: Any, error: type[Exception], named: str) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    damage(tmp_path / "in")
    with pytest.raises(error, match=named) as refusal:
        import_model(tmp_path / "out", read_published(tmp_path / "in"))
    assert "Nothing was converted" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("prefer", "eos"), [("config", 3), ("tokenizer", 5)])
def test_a_choice_settles_ids_that_differ(tmp_path: Path, prefer: Any, eos: int) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    _other_ids(tmp_path / "in")
    model = read_published(tmp_path / "in", prefer_ids=prefer)
    assert model.vocabulary.eod_token_id == eos
    assert model.tokenizer is None


def test_a_folder_without_tokenizer_and_mask_converts(tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    _edit(tmp_path / "in", eos_token_id=None, pad_token_id=None, bos_token_id=None)
    import_model(tmp_path / "out", read_published(tmp_path / "in"))
    document = json.loads((tmp_path / "out" / "model.json").read_text())
    assert document["tokenizer_digest"] is None
    assert document["mask_token_id"] is document["eod_token_id"] is document["pad_token_id"] is None
    vocabulary = read_model(tmp_path / "out").vocabulary
    assert vocabulary.mask_token_id == NO_ID == NO_TOKEN


def test_padding_that_is_also_the_end_of_a_document_is_left_out(tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    _edit(tmp_path / "in", eos_token_id=[7, 8], pad_token_id=7)
    model = read_published(tmp_path / "in")
    assert (model.vocabulary.eod_token_id, model.vocabulary.pad_token_id) == (7, NO_ID)
    assert model.origin().ids["pad"] == 7, "the export writes what was published"


def test_an_existing_target_is_not_touched(tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "in", "llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        import_model(tmp_path / "out", read_published(tmp_path / "in"))
    assert list((tmp_path / "out").iterdir()) == []
