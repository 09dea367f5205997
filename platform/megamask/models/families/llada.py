"""LLaDA-8B and LLaDA 1.5: a bidirectional Llama under OLMo's names.

Source: GSAI-ML/LLaDA-8B-Base, configuration_llada.py and modeling_llada.py (arXiv:2502.09992).
"""

from __future__ import annotations

import re

from megamask.models.families.base import ConfigKeys, Family, TokenIds

_OUTER = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",  # the gate: silu is applied to this one
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def hub_name(canonical: str) -> str:
    """A canonical tensor's name in a LLaDA checkpoint."""
    if match := _LAYER.fullmatch(canonical):
        return f"model.transformer.blocks.{match[1]}.{_INNER[match[2]]}.weight"
    return _OUTER[canonical]


LLADA = Family(
    name="llada",
    architectures=("LLaDAModelLM",),
    model_type="llada",
    keys=ConfigKeys(
        num_layers="n_layers",
        hidden_size="d_model",
        ffn_hidden_size="mlp_hidden_size",
        num_attention_heads="n_heads",
        num_query_groups="n_kv_heads",
        head_dim=None,
        vocab_size="embedding_size",
        max_sequence_length="max_sequence_length",
        tie_embeddings="weight_tying",
        init_std="init_std",
    ),
    switches={
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "layer_norm_with_affine": True,
    },
    hub_name=hub_name,
    attention="bidirectional",
    ids=TokenIds(mask=126336, eos=126081, pad=126081),
    extra={
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
    },
    plain_twin="llama",
)
