"""Qwen3: Llama's names with a norm on each query and key head. Source: transformers, models/qwen3."""

from megamask.models.families.base import Family

QWEN3_SWITCHES = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    qk_norm=True,
    switches=QWEN3_SWITCHES,
    target_shift=True,
)
