"""How text becomes a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity, operational, section


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Either train a byte-level BPE (vocab_size) or load one (path)."""

    vocab_size: int | None = identity(
        "train a byte-level BPE with this many entries, special tokens included",
        default=None,
        minimum=259,
        unit="entries",
    )
    path: str | None = identity("load this tokenizer.json instead of training one", default=None)
    training_bytes: int = identity(
        "a tokenizer is trained on the first training documents up to this much text; not used with path",
        default=100_000_000,
        minimum=1,
        unit="bytes",
    )
    eod_token: str = identity("special token after each document", default="<|endoftext|>")
    pad_token: str = identity("special token that fills the last row", default="<|pad|>")
    mask_token: str = identity("special token of masked positions", default="<|mask|>")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Inputs, splits, tokenizer and row shape of a corpus."""

    inputs: list[str] = identity(
        "files and globs of text (.txt, .py, .md, ...) or .jsonl; "
        "{python_stdlib} stands for the folder of Python's own library"
    )
    output_dir: str = operational("folder of the corpus; must not hold another one")
    sequence_length: int = identity("tokens of a row", minimum=16, unit="tokens")
    validation_fraction: float = identity(
        "share of the documents held out for validation", default=0.02, minimum=0, below=1
    )
    jsonl_text_key: str = identity("key of a .jsonl line that holds the text", default="text")
    rows_per_block: int = identity("rows of a shard member, the unit of shuffling", default=64, minimum=1, unit="rows")
    blocks_per_shard: int = identity("members of a shard", default=256, minimum=1, unit="blocks")
    licence: str | None = operational("licence of the text, recorded in provenance.json", default=None)
    origin: str | None = operational("where the text comes from, recorded in provenance.json", default=None)
    tokenizer: TokenizerConfig = section()
