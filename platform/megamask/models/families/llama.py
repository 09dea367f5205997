"""Llama 2 and 3: the layout that the canonical names are taken from. Source: transformers, models/llama."""

from megamask.models.families.base import Family

LLAMA_SWITCHES = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    switches=LLAMA_SWITCHES,
    target_shift=True,
)
