"""Token ids that do not fit their vocabulary are refused."""

from __future__ import annotations

import pytest

from megamask.errors import UsageError
from megamask.models.vocabulary import Vocabulary

GOOD = {"vocab_size": 100, "padded_vocab_size": 128, "mask_token_id": 99, "eod_token_id": 98, "pad_token_id": 97}


def test_vocabulary_keeps_ids_that_fit() -> None:
    assert Vocabulary(**GOOD).mask_token_id == 99
    assert Vocabulary(**(GOOD | {"padded_vocab_size": 100, "pad_token_id": 98})).padded_vocab_size == 100


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask_token_id": 100}, "mask_token_id is 100; allowed: 0 to 99"),
        ({"eod_token_id": -2}, "eod_token_id is -2; allowed: 0 to 99"),
        ({"pad_token_id": 127}, "pad_token_id is 127; allowed: 0 to 99"),
        ({"mask_token_id": 98}, "also end of document or padding"),
        ({"padded_vocab_size": 99}, "100 entries padded to 99"),
        ({"vocab_size": 0}, "0 entries"),
    ],
)
def test_vocabulary_refuses_ids_that_do_not_fit(changed: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Vocabulary(**(GOOD | changed))
