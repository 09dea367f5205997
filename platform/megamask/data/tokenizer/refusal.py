"""The error for a tokenizer that cannot be used."""

from __future__ import annotations

from megamask.errors import UsageError

_SUPPORTED = (
    "supported are byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, tiktoken) and sentencepiece models with byte_fallback "
    "that do not change text (Llama 2, Mistral, Gemma)"
)


def refuse(name: str, reason: str, hint: str | None = None) -> UsageError:
    """Return the error for a tokenizer that cannot be served.

    Args:
        name: the file, for the message.
        reason: what in it is not supported.
        hint: what to do; by default another tokenizer.
    """
    return UsageError(
        f"{name}: {reason}; {_SUPPORTED}. Nothing was written.",
        hint=hint or "give another corpus.tokenizer.path, or train one with corpus.tokenizer.vocab_size",
    )
