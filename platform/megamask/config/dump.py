"""From a config back to plain values and to YAML that reads as the same config."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import yaml

from megamask.config.variants import meaningless_keys

# What every YAML version, 1.1 included, reads as this very string when it is not quoted.
_UNMISTAKABLE = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_WORDS_WITH_A_MEANING = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", ".inf", ".nan"})


class _Dumper(yaml.SafeDumper):
    """Quotes every string that some reader might take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always: a value that occurs twice is written twice."""
        return True


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = _UNMISTAKABLE.fullmatch(text) and text.lower() not in _WORDS_WITH_A_MEANING
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


class _BlockDumper(_Dumper):
    """Writes a text of several lines as a block that people can read."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if "\n" in text:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
    return _represent_string(dumper, text)


_Dumper.add_representer(str, _represent_string)
_BlockDumper.add_representer(str, _represent_text)


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts, lists, numbers and strings, in the schema's order; shares nothing with the config.

    Keys without a meaning for the objective that is chosen are left out.
    """
    plain = dataclasses.asdict(config)
    for name in meaningless_keys(config):
        *sections, last = name.split(".")
        del reduce(operator.getitem, sections, plain)[last]
    return plain


def to_yaml(config: Any, *, hide: Callable[[Any], Any] | None = None) -> str:
    """A config as YAML: every key, no layers, the same text for equal configs; loading it gives an equal config.

    Args:
        hide: gets the plain tree and returns what may be written of it (the redactor, which is in a higher layer).
    """
    plain = to_plain(config)
    shown = plain if hide is None else hide(plain)
    return yaml.dump(shown, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def documents_to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Documents of plain values as one YAML stream, as kubectl reads it; long texts as blocks."""
    return yaml.dump_all(documents, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=2**31)
