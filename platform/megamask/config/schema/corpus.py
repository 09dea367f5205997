"""Preparation of a corpus from text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.folders import folder_problems
from megamask.config.rules.layout import length_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity, operational, section
from megamask.config.schema.section import Section
from megamask.config.secrets import shown

if TYPE_CHECKING:
    from megamask.config.schema.roots import PrepareConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Either train a byte-level BPE (vocab_size) or load one (path)."""

    vocab_size: int | None = identity(
        "train a byte-level BPE with this many entries, special tokens included",
        default=None,
        minimum=259,
        unit="entries",
    )
    path: str | None = identity(
        "use this tokenizer instead of training one: a folder as Hugging Face publishes it, tokenizer.json, GPT-2's "
        "vocab.json with merges.txt beside it, a sentencepiece .model or a .tiktoken file",
        default=None,
        is_path=True,
    )
    pattern: str | None = identity(
        "how text is cut before the merges of a .tiktoken file: gpt2, cl100k_base, o200k_base or a regular expression",
        default=None,
    )
    training_bytes: int = identity(
        "a tokenizer is trained on the first training documents up to this much text; not used with path",
        default=100_000_000,
        minimum=1,
        unit="bytes",
    )
    eod_token: str | None = identity(
        "special token after each document; null takes the end-of-sentence token that the tokenizer of path names",
        default="<|endoftext|>",
    )
    pad_token: str = identity("special token that fills the last row", default="<|pad|>")
    mask_token: str = identity("special token of masked positions", default="<|mask|>")

    def problems(self, config: PrepareConfig) -> Iterator[Problem]:
        """One source of the tokenizer, and three special tokens that differ."""
        del config
        if (self.vocab_size is None) == (self.path is None):
            what = "both are set" if self.path is not None else "neither is set"
            yield Problem(
                key="corpus.tokenizer.vocab_size",
                because=f"and corpus.tokenizer.path is {shown(self.path)}: {what}",
                allowed="exactly one of them: vocab_size trains a tokenizer, path loads one",
            )
        if self.eod_token is None and self.path is None:
            yield Problem(
                key="corpus.tokenizer.eod_token",
                because="and corpus.tokenizer.path is null: a tokenizer that is trained has no token of its own",
                allowed="a string, or a path to a tokenizer",
            )
        names = ("eod_token", "pad_token", "mask_token")
        tokens = [getattr(self, name) for name in names]
        for index, (name, token) in enumerate(zip(names, tokens, strict=True)):
            key = f"corpus.tokenizer.{name}"
            if token == "":
                yield Problem(key=key, because="which is empty", allowed="a string that no other special token has")
            if token in tokens[:index]:
                twin = names[tokens.index(token)]
                yield Problem(
                    key=key, because=f"which corpus.tokenizer.{twin} is too", allowed="three special tokens that differ"
                )


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Section):
    """Documents to leave out, by their text alone; null asks for no such filter."""

    broken_unicode: bool = identity(
        "leave out documents with bytes that are not UTF-8 or with half a surrogate pair, and count them; false "
        "refuses the input that has one",
        default=False,
    )
    min_characters: int | None = identity(
        "leave out documents with fewer characters", default=None, minimum=1, unit="characters"
    )
    max_characters: int | None = identity(
        "leave out documents with more characters", default=None, minimum=1, unit="characters"
    )
    min_letters: float | None = identity(
        "leave out documents of whose visible characters a smaller share are letters", default=None, above=0, maximum=1
    )
    max_repeated_lines: float | None = identity(
        "leave out documents of whose lines a larger share repeat an earlier one", default=None, minimum=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Section):
    """Inputs, splits, tokenizer and row shape of a corpus."""

    inputs: list[str | dict[str, str]] = identity(
        "files, folders and globs of text (.txt, .py, .md, ...), .jsonl, .ndjson, .parquet, .tar (WebDataset), all but "
        "the last two also .gz or .zst; or mappings {name, path, format, text_key, tokenizer, licence, origin, "
        "version}; {python_stdlib} is the folder of Python's own library",
        is_path=True,
    )
    exclude: list[str] = identity(
        "inputs to leave out: patterns of file names, or globs if they contain a slash", default=[]
    )
    output_dir: str = operational("folder of the corpus; must not hold another one", is_path=True)
    sequence_length: int = identity("tokens of a row", minimum=16, unit="tokens")
    validation_fraction: float = identity(
        "share of the documents held out for validation", default=0.02, minimum=0, below=1
    )
    jsonl_text_key: str = identity("key of a .jsonl line that holds the text", default="text")
    chat_template: str | None = identity(
        "Jinja file, or tokenizer_config.json, whose template turns inputs of the format messages into text; null: a "
        "plain one",
        default=None,
        is_path=True,
    )
    rows_per_block: int = identity("rows of a shard member, the unit of shuffling", default=64, minimum=1, unit="rows")
    blocks_per_shard: int = identity("members of a shard", default=256, minimum=1, unit="blocks")
    packing: str = identity(
        "concatenate: documents one after another, cut into rows; best_fit: a document that fits into a row is not "
        "cut, and rows end in padding",
        default="concatenate",
        choices=("concatenate", "best_fit"),
    )
    licence: str | None = operational("licence of the text, recorded in provenance.json", default=None)
    origin: str | None = operational("where the text comes from, recorded in provenance.json", default=None)
    deduplicate: str = identity(
        "of documents with the same text (exact), or also of those with nearly the same (near, by MinHash), only the "
        "first is taken",
        default="none",
        choices=("none", "exact", "near"),
    )
    near_duplicate_threshold: float = identity(
        "share of equal 5-grams of words (estimated Jaccard similarity) from which two documents are near duplicates",
        default=0.8,
        above=0,
        below=1,
    )
    processes: int | None = operational(
        "processes that read and encode; null: one per processor where the inputs have more than 64 MiB",
        default=None,
        minimum=1,
        unit="processes",
    )
    filters: FilterConfig = section(FilterConfig)
    tokenizer: TokenizerConfig = section()

    def problems(self, config: PrepareConfig) -> Iterator[Problem]:
        """Inputs, folder, length and the key of the text."""
        del config
        if not self.inputs:
            yield Problem(key="corpus.inputs", because="which names no text", allowed="at least one path or glob")
        yield from length_problems("corpus.sequence_length", self.sequence_length)
        yield from folder_problems(
            "corpus.output_dir",
            self.output_dir,
            needs="rename, by which a corpus is published",
            instead="copy the finished corpus to a store, manifest.json last, and give data.corpora its URL",
        )
        if not self.jsonl_text_key:
            yield Problem(key="corpus.jsonl_text_key", because="which is empty", allowed="a key of the .jsonl lines")
