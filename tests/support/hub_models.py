"""Tiny models in Hugging Face layout, made with transformers' own classes; no download, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megamask.models.families.registry import FAMILIES
from support.llada2_reference import LLaDA2Reference

VOCABULARY = 100
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_TWINS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLADA2 = "llada2_moe"


def twin_of(family: str) -> str:
    """The family that transformers itself can run."""
    return FAMILIES[family].plain_twin or family


def twin_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """transformers' network of a family's shape, with weights far enough from zero to distinguish layouts."""
    config_class, model_class = _TWINS[twin_of(family)]
    options = dict(_SIZES) | {"rope_theta": 5e5, "tie_word_embeddings": family == "illada"} | changes
    if family == "llada":
        options["num_key_value_heads"] = options["num_attention_heads"]
    if twin_of(family) == "qwen3_moe":  # LLaDA-MoE: the weights of a token's experts keep their sum, a dense layer
        experts = _EXPERTS | {"norm_topk_prob": family != "llada_moe"}
        options = experts | ({"mlp_only_layers": [0]} if family == "llada_moe" else {}) | options
    if twin_of(family).startswith("qwen3"):
        options.setdefault("head_dim", 24)  # not hidden / heads
    theta = options.pop("rope_theta")
    torch.manual_seed(seed)
    config = config_class(**options, rope_parameters={"rope_type": "default", "rope_theta": theta})
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def save_hub_folder(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Writes a tiny published model of a family; returns a network of the same weights, in float32.

    The network is transformers', or for LLaDA2, which transformers does not have, a plain reference.
    """
    if family == LLADA2:
        return save_llada2_folder(folder, dtype=dtype, **changes)
    model = twin_model(family, **changes)
    model.to(dtype).save_pretrained(folder, max_shard_size="60kB")
    if FAMILIES[family].plain_twin is not None:
        _rename(folder, family)
    return model.float()


def save_llada2_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, is_merged: bool = False, **changes: Any
) -> LLaDA2Reference:
    """Writes a tiny LLaDA2 model, its router's bias in float32 as published."""
    reference = LLaDA2Reference(**changes)
    reference.weights = {
        name: value if name.endswith("expert_bias") else value.to(dtype).float()
        for name, value in reference.weights.items()
    }
    stored = reference.merged() if is_merged else reference.weights
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value if name.endswith("expert_bias") else value.to(dtype) for name, value in stored.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    family = FAMILIES[LLADA2]
    config = {"architectures": list(family.architectures), "model_type": family.model_type} | reference.sizes
    if is_merged:
        config["model_type"] = family.merged_model_type
    (folder / "config.json").write_text(json.dumps(config))
    return reference


def _rename(folder: Path, family_name: str) -> None:
    """Rewrites a plain model's folder into the layout of a family whose classes transformers does not ship."""
    family = FAMILIES[family_name]
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weight_map: dict[str, str] = {}
    for name in names:
        tensors = {family.hub_name(key): value for key, value in load_file(folder / name).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plain = json.loads((folder / "config.json").read_text())
    spec = FAMILIES[family.plain_twin or ""].spec(plain)
    document = family.config(spec, family.token_ids({family.keys.vocab_size: spec.vocab_size}), block_size=4)
    document.pop("rope_parameters")  # published before transformers 5
    (folder / "config.json").write_text(json.dumps(document))


def full_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with every position attending to every other. Shapes: int64 [b, s] -> [b, s, v]."""
    if isinstance(model, LLaDA2Reference):
        return model.logits(tokens)
    rows, positions = tokens.shape
    mask = torch.zeros(rows, 1, positions, positions)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask).logits
    return logits


def causal_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with every position attending to itself and those before it. Shapes as of `full_logits`."""
    if isinstance(model, LLaDA2Reference):
        return model.logits(tokens, torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).tril())
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens).logits
    return logits
