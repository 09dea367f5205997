"""All families, and which one a config.json belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.errors import UsageError
from megamask.models.families.base import Family
from megamask.models.families.dream import DREAM
from megamask.models.families.fast_dllm import FAST_DLLM
from megamask.models.families.illada import ILLADA
from megamask.models.families.llada import LLADA
from megamask.models.families.llada2 import LLADA2
from megamask.models.families.llada_moe import LLADA_MOE
from megamask.models.families.llama import LLAMA
from megamask.models.families.qwen2 import QWEN2
from megamask.models.families.qwen3 import QWEN3
from megamask.models.families.qwen3_moe import QWEN3_MOE
from megamask.models.families.rnd1 import RND1
from megamask.models.families.sdar import SDAR
from megamask.models.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (LLAMA, QWEN2, QWEN3, LLADA, ILLADA, DREAM, SDAR, FAST_DLLM, QWEN3_MOE, RND1, LLADA_MOE, LLADA2)
}

REFUSED: Mapping[str, str] = {
    "GPT2LMHeadModel": "learned positions, LayerNorm and an ungated feed-forward layer",
    "MDLM": "a diffusion transformer with adaptive LayerNorm driven by the noise level",
    "BD3LM": "a diffusion transformer with adaptive LayerNorm driven by the noise level",
    "BertForMaskedLM": "learned positions, LayerNorm and an ungated feed-forward layer",
    "NemotronLabsDiffusionModel": "scaled rotary positions (YaRN) and scaled queries",
    "GiddForDiffusionLM": "soft-capped logits and scaled residuals",
}
"""Known architectures that the network here cannot hold, and why."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures[0]`.

    Raises:
        UsageError: the architecture is missing, unknown, or one that the network here cannot hold.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise UsageError(
            f"config.json: architectures is {architectures!r}; needed: a list with the name of the model's class. "
            "Nothing was converted."
        )
    wanted = architectures[0]
    for family in FAMILIES.values():
        if wanted in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    reason = f", because it has {REFUSED[wanted]}" if wanted in REFUSED else ""
    raise UsageError(
        f"config.json: architecture {wanted} is not supported{reason}. Supported: {known}. Nothing was converted."
    )


def family_named(name: str) -> Family:
    """A family by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in FAMILIES:
        raise UsageError(f"--family is {name!r}; allowed: {', '.join(FAMILIES)}. Nothing was converted.")
    return FAMILIES[name]


def plain_family(spec: ModelSpec) -> Family:
    """The family without remote code that can hold a network.

    Raises:
        UsageError: there is none, as for q/k norms together with biases.
    """
    for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE):
        facts = (family.qk_norm, family.qkv_bias, family.experts is not None)
        if facts == (spec.qk_norm, spec.qkv_bias, spec.experts is not None):
            return family
    experts = "experts" if spec.experts is not None else "no experts"
    raise UsageError(
        f"the network has model.qk_norm {spec.qk_norm}, model.qkv_bias {spec.qkv_bias} and {experts}; no class without "
        "remote code has these together. Nothing was converted.",
        hint="name a layout that holds the network: --family",
    )
