"""Identity of a run: the fields that run.json keeps, and their comparison on resuming.

Values are JSON's own types. Floats are written by Python's json as their shortest decimal form that reads back as the
same float, so 1e-3 stays 1e-3; non-finite numbers never occur in a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import reduce
from typing import Any

from megamask.config.keys import all_keys
from megamask.config.schema.field import Kind
from megamask.config.schema.roots import TrainConfig
from megamask.config.secrets import shown
from megamask.config.variants import meaningless_keys
from megamask.errors import UsageError

CORPORA_KEY = "data.corpora"
MIXTURE_KEY = "data.mixture"


def value_of(config: Any, key: str) -> Any:
    """The value of a dotted key, as training.steps; an entry of a mapping is not a key of its own."""
    return reduce(getattr, key.split("."), config)


def identity_fields(config: TrainConfig) -> dict[str, Any]:
    """Every identity key with its value, the names of the corpora in order, and the mixture where there is one."""
    mixture = {MIXTURE_KEY: list(config.data.mixture)} if config.data.mixture else {}
    return _fields_of_kind(config, "identity") | {CORPORA_KEY: list(config.data.corpora)} | mixture


def extendable_fields(config: TrainConfig) -> dict[str, Any]:
    """Every extendable key with its value; of the corpora the names, because folders are operational."""
    return _fields_of_kind(config, "extendable") | {CORPORA_KEY: list(config.data.corpora)}


def _fields_of_kind(config: TrainConfig, kind: Kind) -> dict[str, Any]:
    outside = meaningless_keys(config)
    return {
        name: value_of(config, name)
        for name, key in all_keys(TrainConfig).items()
        if key.setting.kind == kind and name not in outside
    }


def compare_identity(stored: Mapping[str, Any], config: TrainConfig, *, where: str = "run.json") -> None:
    """Refuse a config that is not the run that was recorded.

    A field that the record does not have yet must have its default, which is what the older version did. Corpora
    may be appended to, never renamed, reordered or taken away.

    Args:
        stored: what `identity_fields` gave when the run began, possibly through JSON.
        where: the record's path, for the message.

    Raises:
        UsageError: names every field that differs, with the stored and the given value.
    """
    given = identity_fields(config)
    recorded_stages = effective_stages(stored.get(MIXTURE_KEY), stored.get(CORPORA_KEY))
    given_stages = effective_stages(given.pop(MIXTURE_KEY, None), given[CORPORA_KEY])
    differences = [
        f"{key} is {shown(given[key])}, recorded {_recorded(key, stored)}"
        for key in given
        if not _is_same(key, stored, given[key])
    ]
    differences += [
        f"{key} is recorded as {shown(value)}, but this version has no such key"
        for key, value in stored.items()
        if key not in (*given, MIXTURE_KEY)
        and key not in meaningless_keys(config)  # there the name of the variant differs
    ]
    if (problem := growth_problem(recorded_stages, given_stages)) is not None:
        differences.append(problem)
    if differences:
        raise UsageError(
            f"this config is not the run of {where}: {'; '.join(differences)}. Nothing was started.",
            hint="give the recorded values to resume the run, or choose another run.name to start a new one",
        )


def effective_stages(mixture: Any, corpora: Any) -> list[dict[str, Any]]:
    """The stages of a recorded or given mixture; without one, the first corpus alone."""
    if isinstance(mixture, list) and mixture:
        return mixture
    names = corpora if isinstance(corpora, list) and corpora else [""]
    return [{"weights": {names[0]: 1}}]


def growth_problem(
    recorded: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]], consumed_tokens: int = 0
) -> str | None:
    """Say what in a mixture would move the past, or None.

    Args:
        recorded, given: of `effective_stages`.
        consumed_tokens: tokens that were read, padding included.
    """
    kept = len(recorded)
    for number, (old, new) in enumerate(zip(recorded, given, strict=False), start=1):
        if _shares(old) != _shares(new):
            return f"{MIXTURE_KEY} stage {number} has other weights than the recorded {shown(dict(old['weights']))}"
        is_end_new = number == kept and "until_tokens" not in old
        if not is_end_new and old.get("until_tokens") != new.get("until_tokens"):
            return f"{MIXTURE_KEY} stage {number} ends elsewhere than the recorded {old.get('until_tokens')}"
        if is_end_new and new.get("until_tokens") is not None and new["until_tokens"] < consumed_tokens:
            return (
                f"{MIXTURE_KEY} stage {number} ends at {new['until_tokens']} tokens, but the run has read "
                f"{consumed_tokens}"
            )
    if len(given) < kept:
        return f"{MIXTURE_KEY} has {len(given)} stages, recorded are {kept}"
    return None


def _shares(stage: Mapping[str, Any]) -> dict[str, Fraction]:
    weights = {name: Fraction(str(weight)) for name, weight in stage["weights"].items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _recorded(key: str, stored: Mapping[str, Any]) -> str:
    return shown(stored[key]) if key in stored else f"nothing (default {shown(all_keys(TrainConfig)[key].default)})"


def _is_same(key: str, stored: Mapping[str, Any], value: Any) -> bool:
    if key not in stored:
        return key != CORPORA_KEY and _equal(all_keys(TrainConfig)[key].default, value)
    if key == CORPORA_KEY:
        names = stored[key]
        return isinstance(names, list) and bool(names) and value[: len(names)] == names
    return _equal(stored[key], value)


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, but 2 is 2.0 (another tool may have rewritten the file)."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
