"""SDAR: block diffusion on Qwen3's layout. Source: JetLM SDAR, configuration_sdar.py and modeling_sdar.py."""

from megamask.models.families.base import ConfigKeys, Family, TokenIds
from megamask.models.families.qwen3 import QWEN3_SWITCHES

SDAR = Family(
    name="sdar",
    architectures=("SDARForCausalLM",),
    model_type="sdar",
    keys=ConfigKeys(block_size="block_size"),
    qk_norm=True,
    switches=QWEN3_SWITCHES,
    attention="block_causal",
    ids=TokenIds(mask=151669, eos=151643, pad=151643, bos=151643),
    extra={
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
    },
    plain_twin="qwen3",
)
