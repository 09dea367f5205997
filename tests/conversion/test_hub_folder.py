import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.name_map import NameMap
from megamask.errors import DataIntegrityError, UsageError
from megamask.models.families.registry import family_of
from support.hub_models import save_hub_folder


@pytest.fixture
def folder(tmp_path):
    save_hub_folder(tmp_path / "model", "llama")
    return tmp_path / "model"


def _first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def _names(folder):
    hub = HubFolder(folder)
    family = family_of(hub.config)
    return hub, NameMap(family=family, spec=family.spec(hub.config))


def test_tensors_come_in_their_stored_number_format(tmp_path):
    save_hub_folder(tmp_path, "qwen3", dtype=torch.bfloat16)
    hub, names = _names(tmp_path)
    assert {value.dtype for _, value in hub.tensors(names.hub_shapes())} == {torch.bfloat16}


@pytest.mark.promise("A truncated or missing safetensors shard is found before anything is converted, exit code 64")
@pytest.mark.parametrize("kept", [0, 5, 400])
def test_a_truncated_shard_is_found_when_the_folder_is_opened(folder, kept):
    shard = _first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(DataIntegrityError, match=f"{shard.name}: it is truncated"):
        HubFolder(folder)


def test_a_missing_shard_is_named(folder):
    shard = _first_shard(folder)
    shard.unlink()
    with pytest.raises(DataIntegrityError, match=f"the file {shard.name} is missing"):
        HubFolder(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    document["weight_map"][name] = "../" + document["weight_map"][name]
    index.write_text(json.dumps(document))
    with pytest.raises(DataIntegrityError, match="is not the name of a file in this folder"):
        HubFolder(folder)


def test_an_index_that_disagrees_with_the_files_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(document))
    with pytest.raises(DataIntegrityError, match="is not where weight_map has it"):
        HubFolder(folder)


def test_missing_and_unexpected_tensors_are_named(folder):
    shard = _first_shard(folder)
    tensors = load_file(shard)
    name, value = tensors.popitem()
    save_file(tensors | {"model.surprise": value}, shard)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"].pop(name)
    document["weight_map"]["model.surprise"] = shard.name
    index.write_text(json.dumps(document))
    hub, names = _names(folder)
    with pytest.raises(DataIntegrityError, match=rf"missing: {name}; 1 tensors are not part .*model\.surprise"):
        names.check(hub)


def test_a_tensor_of_another_shape_is_named(folder):
    hub, _ = _names(folder)
    with pytest.raises(DataIntegrityError, match=r"shape \[64\], config.json asks for \[65\]"):
        hub.tensor("model.norm.weight", (65,))


def test_a_tensor_of_integers_is_refused(folder):
    shard = _first_shard(folder)
    tensors = load_file(shard)
    name, value = next(iter(tensors.items()))
    save_file(tensors | {name: value.to(torch.int8)}, shard)
    with pytest.raises(DataIntegrityError, match="stored as I8"):
        HubFolder(folder).tensor(name, tuple(value.shape))


def test_a_tied_model_may_repeat_its_embedding_but_not_another_head(tmp_path):
    save_hub_folder(tmp_path, "llama", tie_word_embeddings=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    index = tmp_path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    where = tmp_path / document["weight_map"]["model.embed_tokens.weight"]
    head = load_file(where)["model.embed_tokens.weight"]
    document["weight_map"]["lm_head.weight"] = shard.name
    index.write_text(json.dumps(document))
    for value, is_fine in ((head, True), (head + 1, False)):
        save_file(load_file(shard) | {"lm_head.weight": value.clone()}, shard)
        hub, names = _names(tmp_path)
        if is_fine:
            names.check(hub)
        else:
            with pytest.raises(DataIntegrityError, match=r"ties lm_head\.weight"):
                names.check(hub)


def test_rotary_buffers_of_old_files_are_left_out(folder):
    shard = _first_shard(folder)
    save_file(load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, shard)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = shard.name
    index.write_text(json.dumps(document))
    hub, names = _names(folder)
    names.check(hub)


def test_a_pickle_is_never_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UsageError, match=r"only pytorch_model\.bin, which is a pickle and is not read"):
        HubFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "{'a': 1}"])
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(DataIntegrityError, match=r"config\.json: not"):
        HubFolder(folder)


def test_a_path_that_is_no_model_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        HubFolder(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        HubFolder(tmp_path)
