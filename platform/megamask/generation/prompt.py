"""From text to a sequence with masks, and back: a prompt to continue, or text with spans to fill."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megamask.errors import UsageError

_SPAN = re.compile(r"<\|mask(?::(\d{1,6}))?\|>")


class TextTokenizer(Protocol):
    """Interface of a tokenizer for prompts."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special strings in it stay text."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""


@dataclass(frozen=True, kw_only=True)
class MaskedSequence:
    """Tokens with masks to fill.

    Args:
        tokens: ids; mask_token_id where a token is wanted.
        spans: (start, stop) of each masked span, ascending.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]


def continuation(
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    length: int | None,
    mask_token_id: int,
    max_length: int,
    opening: Sequence[int] = (),
) -> MaskedSequence:
    """A prompt followed by `length` masks; None means 64, or what still fits.

    Args:
        opening: tokens that an empty prompt is replaced by.

    Raises:
        UsageError: length is below 1, or prompt and response do not fit in max_length tokens.
    """
    ids = tokenizer.encode(prompt) or list(opening)
    room = max_length - len(ids)
    wanted = min(64, room) if length is None else length
    if room < 1:
        raise UsageError(
            f"--prompt has {len(ids)} tokens, but the model's rows hold {max_length}, the answer included; allowed: at "
            f"most {max_length - 1}. Nothing was decoded.",
            hint="shorten --prompt",
        )
    if not 1 <= wanted <= room:
        raise UsageError(
            f"--length is {wanted} and the prompt has {len(ids)} tokens, but the model's rows hold {max_length}; "
            f"allowed here: 1 to {room}. Nothing was decoded.",
            hint="change --length",
        )
    return MaskedSequence(tokens=ids + [mask_token_id] * wanted, spans=[(len(ids), len(ids) + wanted)])


def infill(tokenizer: TextTokenizer, text: str, *, mask_token_id: int, max_length: int) -> MaskedSequence:
    """Text in which each <|mask:N|> is replaced by N tokens to fill, and <|mask|> for one.

    Raises:
        UsageError: a span is missing or empty, or the text does not fit in max_length tokens.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    end = 0
    for match in _SPAN.finditer(text):
        tokens += tokenizer.encode(text[end : match.start()])
        count = int(match[1] or 1)
        if count < 1:
            raise UsageError(f"--infill has {match[0]}; allowed: 1 token or more. Nothing was decoded.")
        spans.append((len(tokens), len(tokens) + count))
        if spans[-1][1] > max_length:
            break
        tokens += [mask_token_id] * count
        end = match.end()
    if not spans:
        raise UsageError("--infill has no <|mask:N|> span to fill. Nothing was decoded.")
    tokens += tokenizer.encode(text[end:]) if spans[-1][1] <= max_length else []
    total = max(len(tokens), spans[-1][1])
    if total > max_length:
        raise UsageError(
            f"--infill makes at least {total} tokens, but the model's rows hold {max_length}. Nothing was decoded.",
            hint="shorten the text or its spans",
        )
    return MaskedSequence(tokens=tokens, spans=spans)


def until_end(ids: list[int], eod_token_id: int) -> list[int]:
    """The ids before the first end-of-document token."""
    return ids[: ids.index(eod_token_id)] if eod_token_id in ids else ids
