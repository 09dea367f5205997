"""`megamask prepare CONFIG [overrides]`: text into a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

_SHOWN_WARNINGS = 20
# A stdout that cannot take the answer does not undo the work.
ANSWER_IS_ON_DISK = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a corpus config, as configs/corpus/python_stdlib.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, later ones win")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare the corpus, or find the same one already there.

    Returns: corpus_id, documents, tokens, sequences, shards, bytes, vocab_size, output_dir, reused, warnings.
    """
    from megamask.config.load import load_prepare_config
    from megamask.config.validate import validate_prepare
    from megamask_pipelines.corpus import prepare_corpus

    loaded = load_prepare_config(arguments.config, arguments.overrides)
    validate_prepare(loaded.config, loaded.origins)
    return prepare_corpus(loaded.config.corpus)


def render(result: Mapping[str, Any]) -> str:
    """Warnings, then two lines for a person."""
    warnings = result["warnings"]
    shown = [f"warning: {text}\n" for text in warnings[:_SHOWN_WARNINGS]]
    if len(warnings) > len(shown):
        shown.append(f"warning: {len(warnings) - len(shown)} more; --json lists all\n")
    verb = "is already in" if result["reused"] else "prepared in"
    return "".join(shown) + (
        f"corpus {result['corpus_id']} {verb} {result['output_dir']}\n"
        f"{result['documents']} documents, {result['bytes']} bytes of text, {result['tokens']} tokens "
        f"({result['vocab_size']} vocabulary entries), {result['sequences']} sequences in {result['shards']} shard(s)"
    )
