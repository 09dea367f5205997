"""Mixture-of-experts families: names of all tensors, and a round trip that changes no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.joining import canonical_tensors, cut, join, layout_of
from megamask.errors import DataIntegrityError, UsageError
from megamask.models.families.experts import EXPERT_FAMILIES, LLADA2, QWEN3_MOE, ExpertFamily

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "expert_intermediate_size": 8,
    "dense_intermediate_size": 24,
    "moe_layer_freq": [0, 1, 1],
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_experts": 4,
    "num_shared_experts": 2,
    "vocab_size": 32,
}


def _folder(folder: Path, family: ExpertFamily, *, merged: bool) -> HubFolder:
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = family.tensors(family.sizes(CONFIG), merged_experts=merged)
    values = {tensor.name: torch.randn(tensor.shape, generator=generator).bfloat16() for tensor in tensors}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"architectures": list(family.architectures)}))
    return HubFolder(folder)


@pytest.mark.parametrize("merged", [False, True], ids=["separate", "merged"])
@pytest.mark.parametrize("name", sorted(EXPERT_FAMILIES))
@pytest.mark.promise("Tensors of the mixture-of-experts families come back bit for bit, with experts merged or not")
def test_tensors_come_back_bit_for_bit(tmp_path: Path, name: str, merged: bool) -> None:
    family = EXPERT_FAMILIES[name]
    folder = _folder(tmp_path / "in", family, merged=merged)
    layout = layout_of(folder, family, family.sizes(folder.config))
    canonical = canonical_tensors(folder, layout)
    for tensor in layout:
        stored = folder.tensor(tensor.name, tensor.shape)
        assert torch.equal(join(tensor, canonical.__getitem__).view(torch.int16), stored.view(torch.int16))
    other = family.tensors(family.sizes(folder.config), merged_experts=not merged)
    again: dict[str, torch.Tensor] = {}
    for tensor in other:
        again |= cut(tensor, join(tensor, canonical.__getitem__))
    assert set(again) == set(canonical)
    assert all(torch.equal(again[key], canonical[key]) for key in canonical)


def test_names_of_qwen3_moe_are_those_of_transformers(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{key: CONFIG[key] for key in CONFIG if "freq" not in key}))
    model.save_pretrained(tmp_path)
    folder = HubFolder(tmp_path)
    layout = layout_of(folder, QWEN3_MOE, QWEN3_MOE.sizes(folder.config))
    assert {tensor.name for tensor in layout} == folder.tensor_names
    for tensor in layout:
        folder.dtype(tensor.name, tensor.shape)


def test_llada2_keeps_queries_then_keys_then_values_and_the_bias_of_its_router(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", LLADA2, merged=True)
    canonical = canonical_tensors(folder, layout_of(folder, LLADA2, LLADA2.sizes(folder.config)))
    fused = folder.tensor("model.layers.1.attention.query_key_value.weight", (48, 16))
    assert torch.equal(canonical["model.layers.1.self_attn.q_proj.weight"], fused[:24])
    assert torch.equal(canonical["model.layers.1.self_attn.k_proj.weight"], fused[24:36])
    assert torch.equal(canonical["model.layers.1.self_attn.v_proj.weight"], fused[36:])
    assert "model.layers.1.mlp.gate.expert_bias" in canonical
    assert "model.layers.0.mlp.gate.weight" not in canonical
    assert canonical["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (16, 16)
    merged = folder.tensor("model.layers.2.mlp.experts.down_proj", (4, 16, 8))
    assert torch.equal(canonical["model.layers.2.mlp.experts.3.down_proj.weight"], merged[3])


def test_a_tensor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", LLADA2, merged=False)
    with pytest.raises(DataIntegrityError, match="not part of this architecture"):
        layout_of(folder, EXPERT_FAMILIES["llada_moe"], EXPERT_FAMILIES["llada_moe"].sizes(folder.config))
    with pytest.raises(UsageError, match="moe_layer_freq"):
        EXPERT_FAMILIES["llada_moe"].sizes(CONFIG | {"moe_layer_freq": [1, 0, 1]})
