"""The declaration of a setting: default, meaning, unit, allowed values, and the effect of changing it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import MISSING
from typing import Any, Literal

Kind = Literal["identity", "extendable", "operational"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """The declaration of a config field.

    Args:
        kind: identity shapes the result and never changes within a run; extendable may only grow; operational may
            change with every attempt.
        doc: one sentence for people.
        unit: what a number counts, or None.
        minimum, maximum: inclusive range of a number.
        above, below: exclusive range of a number.
        choices: the allowed values of a string.
        pattern: what a complete string must match.
        pattern_words: the pattern in words.
        variants: values of the section's `name` for which this key has a meaning; None for all. Given for another one,
            the key is refused; it is part neither of the run's identity nor of a stored config there.
        takes_mapping: a mapping may be given too and is kept as text: of a list one "name=value" for each entry, of a
            string "{name: value}".
        is_path: the strings are paths: `~` and ${paths.NAME} are replaced, `$NAME` is refused.
    """

    kind: Kind
    doc: str
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    pattern: str | None = None
    pattern_words: str | None = None
    variants: tuple[str, ...] | None = None
    takes_mapping: bool = False
    is_path: bool = False

    def allowed(self) -> str | None:
        """Return the allowed values in words, or None where any value of the type is allowed."""
        if self.choices is not None:
            return ", ".join(self.choices)
        if self.pattern is not None:
            return self.pattern_words or self.pattern
        parts = []
        for bound, sign in ((self.minimum, ">="), (self.above, ">"), (self.maximum, "<="), (self.below, "<")):
            if bound is not None:
                parts.append(f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}")
        return " and ".join(parts) or None

    def accepts(self, value: Any) -> bool:
        """True if a value of the right type lies in the allowed range."""
        if self.choices is not None:
            return value in self.choices
        if self.pattern is not None:
            return re.fullmatch(self.pattern, value) is not None
        return not (
            (self.minimum is not None and value < self.minimum)
            or (self.maximum is not None and value > self.maximum)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


def setting(kind: Kind, doc: str, *, default: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field that carries its Setting; without a default the key must be given."""
    metadata = {"setting": Setting(kind=kind, doc=doc, **limits)}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def identity(doc: str, **options: Any) -> Any:
    """A setting that shapes the result; resuming with another value is refused."""
    return setting("identity", doc, **options)


def extendable(doc: str, **options: Any) -> Any:
    """A setting that may only grow from one attempt to the next."""
    return setting("extendable", doc, **options)


def operational(doc: str, **options: Any) -> Any:
    """A setting that changes how a run is carried out, not what it computes."""
    return setting("operational", doc, **options)


def section(default: type | None = None) -> Any:
    """A nested section of settings, with its own defaults; `default` is its class where code may leave it out."""
    return dataclasses.field(metadata={"section": True}, default_factory=MISSING if default is None else default)
