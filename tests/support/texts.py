"""Small text inputs and the config that prepares them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig

SPECIAL_TEXT = "<|mask|> and <|pad|> then <|endoftext|>\n"


def write_inputs(folder: Path, *, documents: int = 12) -> list[str]:
    """A folder of .txt, .md and .jsonl files, nasty strings among them; returns the globs that match them."""
    folder.mkdir(parents=True)
    (folder / "deep").mkdir()
    for number in range(documents):
        name = f"deep/{number:02d}.md" if number % 3 == 0 else f"{number:02d}.txt"
        text = f"Document {number} says: " + "the quick brown fox jumps. " * (3 * number + 1)
        (folder / name).write_bytes(text.encode())
    (folder / "nasty.txt").write_bytes("\ufeffBOM\r\ncr\rlf\n\x00 \U0001f469\u200d\U0001f467 ü\u0308 日本".encode())
    (folder / "special.txt").write_text(SPECIAL_TEXT * 3)
    (folder / "empty.txt").write_bytes(b"")
    lines = [json.dumps({"text": f"line {number} of the jsonl — ünïcode", "other": 1}) for number in range(5)]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n\n")
    return [f"{folder}/**/*.txt", f"{folder}/**/*.md", f"{folder}/*.jsonl"]


def corpus_config(inputs: list[str], output_dir: Path, **changes: Any) -> CorpusConfig:
    """A config for a few kilobytes of text: rows of 16 tokens, several blocks and shards."""
    config = CorpusConfig(
        inputs=inputs,
        output_dir=str(output_dir),
        sequence_length=16,
        validation_fraction=0.25,
        rows_per_block=4,
        blocks_per_shard=3,
        tokenizer=TokenizerConfig(vocab_size=300),
    )
    return replace(config, **changes)


def tree_of(folder: Path) -> dict[str, bytes]:
    """Relative name and content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
