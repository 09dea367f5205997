"""Qwen3-MoE: Qwen3 with experts in place of the feed-forward part. Source: transformers, models/qwen3_moe."""

from megamask.models.families.base import Family
from megamask.models.families.experts import ExpertKeys
from megamask.models.families.qwen3 import QWEN3_SWITCHES

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    qk_norm=True,
    switches=QWEN3_SWITCHES,
    experts=ExpertKeys(),
    target_shift=True,
)
