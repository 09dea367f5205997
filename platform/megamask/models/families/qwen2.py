"""Qwen2 and Qwen2.5: Llama's names with biases on queries, keys and values. Source: transformers, models/qwen2."""

from megamask.models.families.base import Family

QWEN2_SWITCHES = {"hidden_act": "silu", "use_sliding_window": False}

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    qkv_bias=True,
    switches=QWEN2_SWITCHES,
    target_shift=True,
)
