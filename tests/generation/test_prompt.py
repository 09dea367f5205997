from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import UsageError
from megamask.generation.prompt import continuation, infill, until_end

MASK = 256


class ByteTokenizer:
    """One token for each UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def _infill(text: str, max_length: int = 100) -> tuple[list[int], list[tuple[int, int]]]:
    found = infill(ByteTokenizer(), text, mask_token_id=MASK, max_length=max_length)
    return found.tokens, found.spans


def test_continuation_puts_masks_after_an_untouched_prompt() -> None:
    found = continuation(ByteTokenizer(), "abc", length=4, mask_token_id=MASK, max_length=7)
    assert found.tokens == [97, 98, 99, MASK, MASK, MASK, MASK]
    assert found.spans == [(3, 7)]


@pytest.mark.parametrize(("max_length", "expected"), [(1000, 64), (10, 7), (4, 1)])
def test_continuation_takes_64_tokens_or_what_fits_when_no_length_is_given(max_length: int, expected: int) -> None:
    found = continuation(ByteTokenizer(), "abc", length=None, mask_token_id=MASK, max_length=max_length)
    assert len(found.tokens) == 3 + expected


@pytest.mark.parametrize(("length", "max_length"), [(5, 7), (0, 7), (-1, 7), (None, 3), (1, 2)])
def test_continuation_that_does_not_fit_is_refused(length: int | None, max_length: int) -> None:
    with pytest.raises(UsageError, match="3 tokens, but the model's rows hold"):
        continuation(ByteTokenizer(), "abc", length=length, mask_token_id=MASK, max_length=max_length)


def test_infill_replaces_each_span_by_its_masks() -> None:
    tokens, spans = _infill("a<|mask:3|>b<|mask|>")
    assert tokens == [97, MASK, MASK, MASK, 98, MASK]
    assert spans == [(1, 4), (5, 6)]


@given(parts=st.lists(st.text(max_size=5), min_size=2, max_size=5), counts=st.lists(st.integers(1, 9), min_size=4))
def test_infill_keeps_the_text_around_spans_and_places_them_exactly(parts: list[str], counts: list[int]) -> None:
    if any("<" in part or ">" in part or "|" in part for part in parts):
        return
    text = parts[0] + "".join(f"<|mask:{n}|>{part}" for n, part in zip(counts, parts[1:], strict=False))
    tokens, spans = _infill(text, max_length=10_000)
    assert [token for token in tokens if token != MASK] == list("".join(parts).encode())
    assert [stop - start for start, stop in spans] == counts[: len(parts) - 1]
    assert all(set(tokens[start:stop]) == {MASK} for start, stop in spans)


@pytest.mark.parametrize("text", ["no span", "", "<|mask:|>", "<|mask:-1|>", "<| mask |>"])
def test_infill_without_a_span_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no <\\|mask:N\\|> span"):
        _infill(text)


def test_infill_with_an_empty_span_is_refused() -> None:
    with pytest.raises(UsageError, match="<\\|mask:0\\|>"):
        _infill("a<|mask:0|>")


@pytest.mark.parametrize("text", ["a<|mask:999999|>b", "a<|mask:8|>bc", "abcdefghij<|mask|>"])
def test_infill_longer_than_a_row_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the model's rows hold 10"):
        _infill(text, max_length=10)


def test_text_ends_before_the_first_end_of_document() -> None:
    assert until_end([1, 2, 0, 3, 0], 0) == [1, 2]
    assert until_end([1, 2], 0) == [1, 2]
