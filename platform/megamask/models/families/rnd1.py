"""RND1-30B-A3B: Qwen3-MoE made bidirectional, with the shift of its autoregressive start kept.

Source: Radical Numerics RND1, configuration_rnd.py, modeling_rnd.py and sampling.py, which predicts token i from the
logits at i - 1.
"""

from megamask.models.families.base import Family, TokenIds
from megamask.models.families.experts import ExpertKeys
from megamask.models.families.qwen3 import QWEN3_SWITCHES

RND1 = Family(
    name="rnd1",
    architectures=("RND1LM",),
    model_type="rnd1",
    qk_norm=True,
    switches=QWEN3_SWITCHES,
    experts=ExpertKeys(),
    attention="bidirectional",
    target_shift=True,
    ids=TokenIds(mask=151669, eos=151645, pad=151643),
    extra={
        "auto_map": {
            "AutoConfig": "configuration_rnd.RND1Config",
            "AutoModel": "modeling_rnd.RND1Model",
            "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
        },
    },
    plain_twin="qwen3_moe",
)
