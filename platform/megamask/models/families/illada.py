"""iLLaDA-8B: a bidirectional Llama with grouped queries and tied embeddings, under Llama's names.

Source: the published iLLaDA-8B checkpoint's class name, sizes and ids; its remote code is not needed for the weights.
"""

from megamask.models.families.base import Family, TokenIds
from megamask.models.families.llama import LLAMA_SWITCHES

ILLADA = Family(
    name="illada",
    architectures=("ILLaDAForCausalLM",),
    model_type="illada",
    switches=LLAMA_SWITCHES,
    attention="bidirectional",
    ids=TokenIds(mask=5, eos=2, pad=1, bos=0),
    plain_twin="llama",
)
