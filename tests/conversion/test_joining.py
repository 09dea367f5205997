"""Mixture-of-experts families: names of all tensors, fused and merged ones, and a round trip that changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.importing import import_model, read_published
from megamask.conversion.name_map import NameMap
from megamask.errors import DataIntegrityError, UsageError
from megamask.models.families.registry import FAMILIES
from megamask_pipelines.convert import to_hub
from support.hub_models import LLADA2, save_hub_folder, save_llada2_folder, twin_model

EXPERT_FAMILIES = sorted(name for name, family in FAMILIES.items() if family.experts is not None)


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@pytest.mark.promise("Merged experts come back merged and separate ones separate, bit for bit, and each as the other")
def test_experts_come_back_in_either_form(tmp_path: Path, merged: bool) -> None:
    reference = save_llada2_folder(tmp_path / "in", dtype=torch.bfloat16, is_merged=merged)
    import_model(tmp_path / "checkpoint", read_published(tmp_path / "in"))
    forms = {"as imported": None, "separate": "separate", "merged": "merged"}
    found, configs = {}, {}
    for name, form in forms.items():
        to_hub(tmp_path / "checkpoint", tmp_path / name, experts=form)
        found[name] = load_file(tmp_path / name / "model.safetensors")
        configs[name] = HubFolder(tmp_path / name).config
    stored = load_file(tmp_path / "in" / "model.safetensors")
    assert set(found["as imported"]) == set(stored)
    assert all(torch.equal(_bytes(found["as imported"][name]), _bytes(stored[name])) for name in stored)
    for name, weights in (("separate", reference.weights), ("merged", reference.merged())):
        assert set(found[name]) == set(weights)
        assert all(torch.equal(found[name][key].float(), weights[key]) for key in weights)
    assert [configs[name]["model_type"] for name in ("separate", "merged")] == ["llada2_moe", "llada2_moe_veomni"]


def test_llada2_keeps_queries_then_keys_then_values_and_the_bias_of_its_router(tmp_path: Path) -> None:
    reference = save_llada2_folder(tmp_path / "in", is_merged=True)
    folder = HubFolder(tmp_path / "in")
    names = NameMap.of_folder(folder, FAMILIES[LLADA2])
    fused = reference.weights["model.layers.1.attention.query_key_value.weight"]
    for name, rows in (("q", fused[:96]), ("k", fused[96:144]), ("v", fused[144:])):
        assert torch.equal(names.tensor(folder, f"model.layers.1.self_attn.{name}_proj.weight"), rows)
    part = names.rectangle(folder, "model.layers.1.self_attn.k_proj.weight", (slice(3, 9), slice(0, 5)))
    assert torch.equal(part, fused[99:105, :5])
    for name in ("gate.expert_bias", "shared_experts.up_proj.weight", "experts.3.down_proj.weight"):
        complete = f"model.layers.1.mlp.{name}"
        assert torch.equal(names.tensor(folder, complete), reference.weights[complete])
    part = names.rectangle(folder, "model.layers.2.mlp.experts.3.down_proj.weight", (slice(2, 7), slice(1, 3)))
    assert torch.equal(part, reference.weights["model.layers.2.mlp.experts.3.down_proj.weight"][2:7, 1:3])


def test_names_of_qwen3_moe_are_those_of_transformers(tmp_path: Path) -> None:
    twin_model("qwen3_moe").save_pretrained(tmp_path)
    folder = HubFolder(tmp_path)
    names = NameMap.of_folder(folder, FAMILIES["qwen3_moe"])
    assert set(names.published) == folder.tensor_names
    for name, tensor in names.published.items():
        folder.dtype(name, tensor.shape)


def test_a_tensor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "in", LLADA2)
    stored = load_file(tmp_path / "in" / "model.safetensors")
    del stored["model.layers.1.mlp.gate.expert_bias"]
    save_file(stored, tmp_path / "in" / "model.safetensors")
    with pytest.raises(DataIntegrityError, match=r"1 tensors are missing: model.layers.1.mlp.gate.expert_bias"):
        read_published(tmp_path / "in")


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llada_moe", {"moe_layer_freq": [1, 0, 1]}, "moe_layer_freq"),
        ("llada_moe", {"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
        ("llada_moe", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
        ("llada_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rnd1", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        (LLADA2, {"score_function": "softmax"}, "score_function"),
        (LLADA2, {"topk_group": 1}, "topk_group"),
        (LLADA2, {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        (LLADA2, {"use_qkv_bias": True}, "use_qkv_bias"),
    ],
)
@pytest.mark.promise("A router or a layer order that the network here has not is refused, with the key named")
def test_experts_that_the_network_has_not_are_refused(
    tmp_path: Path, family: str, change: dict[str, Any], named: str
) -> None:
    save_hub_folder(tmp_path / "in", family)
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | change
    with pytest.raises(UsageError, match=f"config.json: .*{named}"):
        FAMILIES[family].spec(config)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_numbers_that_a_file_leaves_out_have_the_published_meaning(tmp_path: Path, family: str) -> None:
    save_hub_folder(tmp_path / "in", family)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    spec = FAMILIES[family].spec(config)
    assert spec.experts is not None
    assert spec.experts.num_dense_layers == (1 if family in ("llada_moe", LLADA2) else 0)
    assert spec.experts.normalizes is (family != "llada_moe")
    assert spec.rotary_fraction == (0.5 if family == LLADA2 else 1.0)
    for key in ("mlp_only_layers", "moe_layer_freq", "first_k_dense_replace", "norm_topk_prob"):
        config.pop(key, None)
    left_out = FAMILIES[family].spec(config).experts
    assert left_out is not None
    assert (left_out.num_dense_layers, left_out.normalizes) == (0, family == LLADA2)


def test_an_export_names_what_its_family_cannot_hold(tmp_path: Path) -> None:
    save_hub_folder(tmp_path / "in", LLADA2)
    import_model(tmp_path / "checkpoint", read_published(tmp_path / "in"))
    with pytest.raises(UsageError, match=r"rotary_fraction 0.5, family qwen3_moe turns all channels"):
        to_hub(tmp_path / "checkpoint", tmp_path / "out", family_name="qwen3_moe")
    with pytest.raises(UsageError, match="--experts is 'some'; allowed: separate, merged"):
        to_hub(tmp_path / "checkpoint", tmp_path / "out", experts="some")
    save_llada2_folder(tmp_path / "full", partial_rotary_factor=1.0)
    import_model(tmp_path / "other", read_published(tmp_path / "full"))
    with pytest.raises(UsageError, match="score 'sigmoid', family qwen3_moe has 'softmax'"):
        to_hub(tmp_path / "other", tmp_path / "out", family_name="qwen3_moe")
    save_hub_folder(tmp_path / "dense", "llama")
    import_model(tmp_path / "llama", read_published(tmp_path / "dense"))
    with pytest.raises(UsageError, match="--experts is merged, but the network is dense"):
        to_hub(tmp_path / "llama", tmp_path / "out", experts="merged")
    assert not (tmp_path / "out").exists()
