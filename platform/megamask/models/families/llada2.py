"""LLaDA2.0 mini and flash: block diffusion with 256 experts, chosen by sigmoid scores and a bias inside groups.

Source: inclusionAI LLaDA2.0 and dFactory, modeling_llada2_moe.py: `query_key_value` holds all queries, then all keys,
then all values; dFactory merges the experts of a layer and names the model type after its trainer.
"""

from __future__ import annotations

from megamask.models.families.base import ConfigKeys, Family, TokenIds
from megamask.models.families.experts import ExpertKeys

_OUTER = {"model.embed_tokens.weight": "model.word_embeddings.weight"}
_INNER = {
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "self_attn.o_proj": "attention.dense",
}


def hub_name(canonical: str) -> str:
    """A canonical tensor's name in a LLaDA2 checkpoint, where it is one by itself."""
    for inner, published in _INNER.items():
        if f".{inner}." in canonical:
            return canonical.replace(inner, published)
    return _OUTER.get(canonical, canonical)


LLADA2 = Family(
    name="llada2_moe",
    architectures=("LLaDA2MoeModelLM",),
    model_type="llada2_moe",
    merged_model_type="llada2_moe_veomni",
    keys=ConfigKeys(rotary_fraction="partial_rotary_factor", block_size="block_size"),
    qk_norm=True,
    switches={
        "hidden_act": "silu",
        "use_qkv_bias": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True,
    },
    hub_name=hub_name,
    fused_name="attention.query_key_value.weight",
    experts=ExpertKeys(
        num_shared="num_shared_experts",
        scale="routed_scaling_factor",
        num_groups="n_group",
        topk_groups="topk_group",
        dense_layers="first_k_dense_replace",
        score="sigmoid",
        has_bias=True,
        normalizes=None,
    ),
    attention="block_causal",
    default_block_size=32,
    ids=TokenIds(mask=156895, eos=156892, pad=156892),
    extra={
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
    },
)
