"""Tokenizers: what other projects publish is turned into one stored form, which is all that the rest of data reads."""

from megamask.data.tokenizer.corpus_tokenizer import (
    NO_TOKEN,
    SPECIAL_TOKENS_NAME,
    TOKENIZER_DIR,
    TOKENIZER_NAME,
    CorpusTokenizer,
    verify_files,
)
from megamask.data.tokenizer.special_tokens import SpecialTokens

__all__ = [
    "NO_TOKEN",
    "SPECIAL_TOKENS_NAME",
    "TOKENIZER_DIR",
    "TOKENIZER_NAME",
    "CorpusTokenizer",
    "SpecialTokens",
    "verify_files",
]
