"""Facts of run.json that every line of a journal must fit; another version of megamask may have written it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megamask.audit.story import Rules
from megamask.config.keys import Key, all_keys
from megamask.config.schema.initialise import InitialiseConfig
from megamask.config.schema.objective import ObjectiveConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.schema.training import TrainingConfig
from megamask.config.secrets import shown
from megamask.errors import UsageError
from megamask.objectives.schedule import at_step, phases_of
from megamask.objectives.shapes import shape_of
from megamask.runs.record import RunRecord
from megamask.runs.skips import Rewind
from megamask.training.batch_size import consumed_before, first_step
from megamask.training.schedules import learning_rate

_SECTION = "training."
_OBJECTIVE = "objective."
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
}


def rules_of(record: RunRecord, configs: Mapping[int, TrainConfig], rewinds: Sequence[Rewind] = ()) -> Rules:
    """Return the rules of a run; a key that the record lacks has its default, unknown keys are ignored.

    Args:
        configs: of the attempts, each of this run's identity.
        rewinds: of skips.json.

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
    settings = {
        name.removeprefix(_OBJECTIVE): _recorded(record, identity, key)
        for name, key in keys.items()
        if name.startswith(_OBJECTIVE)
    }
    section = ObjectiveConfig(**settings)  # resolves what depends on the name
    phases = phases_of(
        section.settings(), training.sequence_length, lambda amount, unit: first_step(amount, unit, training)
    )
    return Rules(
        run_id=record.run_id,
        corpora=content["corpora"],
        consumed_before=lambda step: consumed_before(step, training),
        shape_at=lambda step: shape_of(at_step(phases, step), training.sequence_length),
        sequence_length=training.sequence_length,
        rewinds=rewinds,
        run_sha256=record.sha256,
        code_version=str(content["code_version"]) if "code_version" in content else None,
        learning_rate=lambda attempt, step: _rate(configs.get(attempt), step),
        has_shift=_shift(record, keys),
    )


def _shift(record: RunRecord, keys: Mapping[str, Key]) -> Callable[[int], bool]:
    """Of each step, whether its targets are shifted: as far as the source's are, and initialise.shift keeps that."""
    parent = record.content.get("parent_checkpoint") or {}
    setting = _recorded(record, record.content["identity"], keys["initialise.shift"])
    until = InitialiseConfig(shift=setting).shift_until_step
    is_kept = bool(parent.get("target_shift")) and setting != "drop"
    return lambda step: is_kept and (until is None or step <= until)


def _rate(config: TrainConfig | None, step: int) -> float | None:
    if config is None or step > config.training.steps:
        return None
    return learning_rate(step, config.optimizer, config.training)


def _recorded(record: RunRecord, values: Mapping[str, Any], key: Key) -> Any:
    value = values.get(key.name, key.default)
    if key.is_optional and value is None:
        return None
    if type(value) in _TYPES[key.base] and key.setting.accepts(value):
        return value
    found = f"has {key.name} = {shown(value)}" if key.name in values else f"does not state {key.name}"
    raise UsageError(
        f"{record.path} {found}; to check the journal's steps it must be {key.allowed}. Nothing was checked.",
        hint="use the version of megamask that started the run",
    )
