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
    parser.add_argument(
        "--task",
        metavar="K/N",
        help="do one of N tasks, K from 0, and publish nothing; repeating it does what is missing",
    )
    parser.add_argument("--merge", action="store_true", help="publish the corpus once all tasks are done")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare the corpus, or find the same one already there.

    Returns: corpus_id, documents, tokens, sequences, shards, bytes, vocab_size, output_dir, reused, warnings; of one
        task: task, num_tasks, units, reused, units_of_all.
    """
    from megamask.config.load import load_prepare_config
    from megamask.config.validate import validate_prepare
    from megamask.errors import UsageError
    from megamask_pipelines.corpus import prepare_corpus, prepare_task

    if arguments.task is not None and arguments.merge:
        raise UsageError("--task and --merge exclude each other: tasks first, then one merge. Nothing was done.")

    loaded = load_prepare_config(arguments.config, arguments.overrides)
    validate_prepare(loaded.config, loaded.origins)
    if arguments.task is not None:
        return prepare_task(loaded.config.corpus, arguments.task)
    return prepare_corpus(loaded.config.corpus, only_merge=arguments.merge)


def render(result: Mapping[str, Any]) -> str:
    """Warnings, then two lines for a person."""
    if "num_tasks" in result:
        return (
            f"task {result['task']} of {result['num_tasks']}: {result['units']} of {result['units_of_all']} units are "
            f"done, {result['reused']} of them before"
        )
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
