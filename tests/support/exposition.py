"""A strict parser of Prometheus' text exposition format 0.0.4, as far as a textfile collector accepts it."""

from __future__ import annotations

import re
from typing import NamedTuple

_HELP = re.compile(r"# HELP ([a-z_]+) ((?:[^\\\n]|\\\\|\\n)+)")
_TYPE = re.compile(r"# TYPE ([a-z_]+) (counter|gauge)")
_SERIES = re.compile(r"([a-z_]+)\{(.*)\} (\S+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"')
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|NaN|[+-]Inf")
_ESCAPED = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


class Series(NamedTuple):
    """One line of values."""

    name: str
    labels: dict[str, str]
    value: float


def parsed(text: str) -> list[Series]:
    """Return the series of a text in which each metric has one of them; AssertionError for any other text."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert len(lines) % 3 == 0
    found = []
    for i in range(0, len(lines), 3):
        meaning, kind, series = (
            pattern.fullmatch(line) for pattern, line in zip((_HELP, _TYPE, _SERIES), lines[i : i + 3], strict=True)
        )
        assert meaning and kind and series, lines[i : i + 3]
        assert meaning[1] == kind[1] == series[1]
        assert _NUMBER.fullmatch(series[3]), series[3]
        found.append(Series(series[1], _labels(series[2]), float(series[3])))
    assert len({series.name for series in found}) == len(found)
    return found


def _labels(text: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    while text:
        match = _LABEL.match(text)
        assert match and match[1] not in labels, text
        labels[match[1]] = re.sub(r"\\.", lambda pair: _ESCAPED[pair[0]], match[2])
        text = text[match.end() :]
        if text:
            assert text.startswith(",") and len(text) > 1, text
            text = text[1:]
    return labels
