"""What run.json says that every line of a journal must fit; another version of megamask may have written it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.audit.story import Rules
from megamask.config.keys import Key, all_keys
from megamask.config.schema.roots import TrainConfig
from megamask.config.schema.training import TrainingConfig
from megamask.config.secrets import shown
from megamask.errors import UsageError
from megamask.runs.record import RunRecord
from megamask.training.batch_size import consumed_before

_SECTION = "training."
_TYPES = {"int": int, "bool": bool}


def rules_of(record: RunRecord) -> Rules:
    """The rules of a run; a key that the record does not have stands at its default, one that nobody knows is let be.

    Raises:
        UsageError: a key is missing that has no default, or its value is not of its kind.
    """
    content, keys = record.content, all_keys(TrainConfig)
    identity = content["identity"]
    names = [name for name, key in keys.items() if name.startswith(_SECTION) and key.setting.kind == "identity"]
    training = TrainingConfig(
        steps=_recorded(record, content["extendable"], keys["training.steps"]),
        **{name.removeprefix(_SECTION): _recorded(record, identity, keys[name]) for name in names},
    )
    return Rules(
        run_id=record.run_id,
        corpora=content["corpora"],
        consumed_before=lambda step: consumed_before(step, training),
        num_views=2 if _recorded(record, identity, keys["objective.complementary"]) else 1,
        sequence_length=training.sequence_length,
    )


def _recorded(record: RunRecord, values: Mapping[str, Any], key: Key) -> Any:
    value = values.get(key.name, key.default)
    if key.is_optional and value is None:
        return None
    if type(value) is _TYPES[key.base] and _is_at_least(value, key.setting.minimum):
        return value
    found = f"has {key.name} = {shown(value)}" if key.name in values else f"does not say {key.name}"
    raise UsageError(
        f"{record.path} {found}; to check the journal's steps it must be {key.allowed}. Nothing was checked.",
        hint="use the version of megamask that started the run",
    )


def _is_at_least(value: Any, lowest: float | None) -> bool:
    return lowest is None or value >= lowest
