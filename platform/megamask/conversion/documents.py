"""The documents beside the weights of an exported model: configuration, tokenizer, and our own record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamask.conversion.hub_folder import CONFIG_NAME, GENERATION_NAME
from megamask.conversion.name_map import NameMap
from megamask.models.families.base import AttentionKind, TokenIds

RECORD_NAME = "megamask.json"
RECORD_FORMAT = "megamask-export"
RECORD_VERSION = 1
_CLASS_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """Facts that a decoder needs about exported weights and that the configuration of a plain class lacks.

    Args:
        attention: the pattern that the weights were trained with.
        target_shift: whether the logits at a position predict the token after it.
        block_size: tokens of a diffusion block that was trained with; None for another kind of model.
        objective: as in model.json.
        checkpoint: digest of the checkpoint that was exported.
        step: its step.
    """

    attention: AttentionKind
    target_shift: bool
    block_size: int | None
    objective: Mapping[str, Any]
    checkpoint: str
    step: int

    def to_json(self, ids: TokenIds, *, is_tied: bool) -> dict[str, Any]:
        """The content of megamask.json."""
        return {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "attention": self.attention,
            "target_shift": self.target_shift,
            "train_block_size": self.block_size,
            "mask_token_id": ids.mask,
            "tied": is_tied,
            "objective": dict(self.objective),
            "checkpoint": self.checkpoint,
            "step": self.step,
        }


def documents(
    names: NameMap,
    ids: TokenIds,
    record: ExportRecord,
    *,
    dtype: str,
    tokenizer_json: bytes | None,
    special_tokens: Mapping[str, str],
) -> dict[str, bytes]:
    """Return file name -> content.

    Args:
        dtype: F32, BF16 or F16, what most weights are stored as.
        tokenizer_json: the tokenizer's artefact, or None for a model without one.
        special_tokens: eos, pad and mask -> the token's text, where there is a tokenizer.
    """
    spec = names.spec
    config = names.family.config(spec, ids, block_size=record.block_size, has_merged_experts=names.has_merged_experts)
    # both spellings: transformers 5 reads dtype, older versions torch_dtype
    config |= {"dtype": _CLASS_NAMES[dtype], "torch_dtype": _CLASS_NAMES[dtype]}
    generation = {name: value for name, value in ids.to_config().items() if name in ("eos_token_id", "pad_token_id")}
    files = {
        CONFIG_NAME: config,
        GENERATION_NAME: generation,
        RECORD_NAME: record.to_json(ids, is_tied=spec.tie_embeddings),
    }
    if tokenizer_json is not None:
        tokens = {f"{kind}_token": text for kind, text in special_tokens.items()}
        files["special_tokens_map.json"] = tokens
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_sequence_length,
            "clean_up_tokenization_spaces": False,
            **tokens,
        }
    written = {name: _to_bytes(document) for name, document in files.items()}
    return written if tokenizer_json is None else written | {"tokenizer.json": tokenizer_json}


def _to_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
