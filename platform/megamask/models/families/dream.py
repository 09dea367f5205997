"""Dream-7B, Dream-Coder and DiffuCoder: a bidirectional Qwen2.5 that kept the shift of its autoregressive start.

Source: HKUNLP Dream, configuration_dream.py and modeling_dream.py; arXiv:2508.15487.
"""

from megamask.models.families.base import Family, TokenIds
from megamask.models.families.qwen2 import QWEN2_SWITCHES

DREAM = Family(
    name="dream",
    architectures=("DreamModel",),
    model_type="Dream",
    qkv_bias=True,
    switches=QWEN2_SWITCHES,
    attention="bidirectional",
    target_shift=True,
    ids=TokenIds(mask=151666, eos=151643, pad=151643, bos=151643),
    extra={
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    },
    plain_twin="qwen2",
)
