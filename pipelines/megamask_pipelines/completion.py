"""Shell completion of verbs, options, files and settings, by argcomplete.

`eval "$(register-python-argcomplete megamask)"` turns it on in a shell, which then asks this program at each Tab.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping
from typing import Any


def is_asked() -> bool:
    """Return True if a shell started this process for completions."""
    return "_ARGCOMPLETE" in os.environ


def answer(verbs: Mapping[str, str]) -> None:
    """Write the completions of the line that a shell asks about, and end the process.

    Args:
        verbs: help of each verb; only the module of the one on the line is imported.
    """
    import argcomplete

    argcomplete.autocomplete(command_parser(verbs, os.environ.get("COMP_LINE", "").split()))


def command_parser(verbs: Mapping[str, str], words: list[str]) -> argparse.ArgumentParser:
    """Return a parser of the complete command line, with the arguments of the verb on it.

    Args:
        words: the line, from the program's name on.
    """
    parser = argparse.ArgumentParser(prog="megamask", allow_abbrev=False)
    choices = parser.add_subparsers(dest="verb")
    for name, text in verbs.items():
        verb = choices.add_parser(name, help=text, allow_abbrev=False)
        if name in words[1:2]:
            importlib.import_module(f"megamask_pipelines.cli.{name.replace('-', '_')}").add_arguments(verb)
            verb.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
            for action in verb._actions:
                if action.dest in ("overrides", "key"):
                    action.completer = _settings(name, is_assigned=name != "explain")  # type: ignore[attr-defined]
    return parser


def _settings(verb: str, *, is_assigned: bool) -> Any:
    """Return a completer of the settings that a verb takes."""
    from megamask.config.keys import all_keys
    from megamask.config.schema.roots import PrepareConfig, TrainConfig

    names = list(all_keys(PrepareConfig if verb == "prepare" else TrainConfig))
    if verb == "explain":
        names += list(all_keys(PrepareConfig))

    def complete(prefix: str, **_: Any) -> list[str]:
        return [f"{name}=" if is_assigned else name for name in names if name.startswith(prefix)]

    return complete
