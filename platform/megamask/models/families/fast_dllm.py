"""Fast-dLLM v2: block diffusion on Qwen2.5's layout, with the shift kept.

Source: NVIDIA Fast-dLLM v2, configuration.py and modeling.py; arXiv:2509.26328.
"""

from megamask.models.families.base import ConfigKeys, Family, TokenIds
from megamask.models.families.qwen2 import QWEN2_SWITCHES

FAST_DLLM = Family(
    name="fast_dllm_v2",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    model_type="Fast_dLLM_Qwen",
    keys=ConfigKeys(block_size="bd_size"),
    qkv_bias=True,
    switches=QWEN2_SWITCHES,
    attention="block_causal",
    target_shift=True,
    ids=TokenIds(mask=151665, eos=151645, pad=151645),
    extra={
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
    },
    plain_twin="qwen2",
)
