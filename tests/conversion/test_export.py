import json

import pytest
import torch
from safetensors.torch import load_file

from megamask.conversion.export import ExportPlan, export
from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.name_map import NameMap
from megamask.conversion.shard_writer import DTYPE_NAMES, PlannedTensor, plan_shards, write_shard
from megamask.errors import UsageError
from megamask.models.families.registry import FAMILIES, family_of
from megamask.models.shapes import canonical_shapes
from support.hub_models import save_hub_folder


def _source(folder):
    """Canonical float32 tensors, the plan of an export that repeats the folder, and the stored tensors."""
    hub = HubFolder(folder)
    family = family_of(hub.config)
    names = NameMap.of_folder(hub, family)
    stored = dict(hub.tensors(names.hub_shapes()))
    plan = ExportPlan(
        names=names,
        dtypes={name: value.dtype for name, value in stored.items()},
        documents={"config.json": json.dumps(hub.config).encode()},
        source_digest="0" * 64,
        max_shard_bytes=40_000,
    )
    return {name: names.tensor(hub, name).float() for name in canonical_shapes(names.spec)}, plan, stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.promise("Weights come back from an import and an export bit for bit, family by family")
def test_tensors_come_back_bit_for_bit(tmp_path, family, dtype):
    save_hub_folder(tmp_path / "in", family, dtype=dtype)
    weights, plan, stored = _source(tmp_path / "in")
    report = export(tmp_path / "out", plan, weights.__getitem__)
    found = {}
    for file in report.files:
        found |= load_file(tmp_path / "out" / file)
    assert set(found) == set(stored)
    assert all(torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in stored.items())
    assert report.tensors == len(stored)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*report.files, "config.json", "model.safetensors.index.json"]
    )


@pytest.mark.promise("An interrupted export continues with the first missing file, and its bytes are the same")
def test_an_interrupted_export_continues(tmp_path):
    save_hub_folder(tmp_path / "in", "llama")
    weights, plan, _ = _source(tmp_path / "in")
    export(tmp_path / "whole", plan, weights.__getitem__)
    calls = []

    def dies(name):
        calls.append(name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return weights[name]

    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", plan, dies)
    assert not (tmp_path / "out").exists()
    report = export(tmp_path / "out", plan, weights.__getitem__)
    assert report.resumed_files > 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_interrupted_export_of_other_weights_is_not_continued(tmp_path):
    save_hub_folder(tmp_path / "in", "llama")
    weights, plan, _ = _source(tmp_path / "in")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "plan.sha256").write_text("another")
    (partial / "model-00001-of-00003.safetensors").write_bytes(b"stale")
    assert export(tmp_path / "out", plan, weights.__getitem__).resumed_files == 0


def test_a_folder_that_exists_is_not_touched(tmp_path):
    save_hub_folder(tmp_path / "in", "llama")
    weights, plan, _ = _source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "out", plan, weights.__getitem__)
    (tmp_path / "other.partial").mkdir()
    with pytest.raises(UsageError, match="was not made by an interrupted conversion"):
        export(tmp_path / "other", plan, weights.__getitem__)


def test_a_tensor_that_does_not_read_back_leaves_no_folder(tmp_path):
    save_hub_folder(tmp_path / "in", "llama")
    weights, plan, _ = _source(tmp_path / "in")
    seen = set()

    def changes(name):
        value = weights[name] + (1.0 if name in seen else 0.0)
        seen.add(name)
        return value

    with pytest.raises(Exception, match="does not read back"):
        export(tmp_path / "out", plan, changes)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_shards_hold_no_more_than_asked_unless_one_tensor_does():
    tensors = [PlannedTensor(name=str(n), shape=(size,), dtype=torch.float32) for n, size in enumerate([3, 3, 9, 1])]
    shards = plan_shards(tensors, 24)
    assert [[tensor.name for tensor in group] for group in shards.values()] == [["0", "1"], ["2"], ["3"]]
    assert list(plan_shards(tensors, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES, key=str))
def test_the_library_reads_a_written_file(tmp_path, dtype):
    values = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(7).to(dtype), "c": torch.zeros(0, 4, dtype=dtype)}
    tensors = [PlannedTensor(name=name, shape=tuple(value.shape), dtype=dtype) for name, value in values.items()]
    size = write_shard(
        tmp_path / "x.safetensors", tensors, lambda tensor: values[tensor.name], metadata={"format": "pt"}
    )
    assert size == (tmp_path / "x.safetensors").stat().st_size
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_a_value_of_another_shape_is_not_written(tmp_path):
    tensors = [PlannedTensor(name="a", shape=(2,), dtype=torch.float32)]
    with pytest.raises(ValueError, match="planned was"):
        write_shard(tmp_path / "x", tensors, lambda tensor: torch.zeros(3), metadata={})
    assert not (tmp_path / "x").exists()
