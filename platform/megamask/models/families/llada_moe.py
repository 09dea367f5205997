"""LLaDA-MoE-7B-A1B: a bidirectional mixture of experts under Qwen3-MoE's names; the experts' weights keep their sum.

Source: inclusionAI LLaDA-MoE, configuration_lladamoe.py and modeling_lladamoe.py.
"""

from megamask.models.families.base import ConfigKeys, Family, TokenIds
from megamask.models.families.experts import ExpertKeys

LLADA_MOE = Family(
    name="llada_moe",
    architectures=("LLaDAMoEModelLM",),
    model_type="lladamoe",
    keys=ConfigKeys(ffn_hidden_size="dense_intermediate_size", rotary_fraction="partial_rotary_factor"),
    qk_norm=True,
    switches={
        "hidden_act": "silu",
        "attention_bias": False,
        "qk_layernorm": True,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "routed_scaling_factor": 1,
        # no groups: null, or the default of the configuration's class
        "router_num_group": (None, -2),
        "router_topk_group": (None, -2),
        "clip_qkv": None,
        "shared_expert_intermediate_size": (None, -1),
    },
    experts=ExpertKeys(ffn_hidden_size="expert_intermediate_size", dense_layers="moe_layer_freq"),
    attention="bidirectional",
    ids=TokenIds(mask=156895, eos=156892),
    extra={
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAMoEConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModel",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
    },
    plain_twin="qwen3_moe",
)
