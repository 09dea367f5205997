"""Phases of an objective: from which step on it has which settings, a function of the config alone and without torch.

Two things change an objective during a run: the block-size schedule (`objective.block_schedule`; LLaDA2.0's 1 -> 4 ->
32 -> 64 -> L -> ... -> 32) and the end of the complementary pair (`objective.complementary_until_tokens`). Inside a
phase every tensor has one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megamask.config.rules.block_schedule import block_phases
from megamask.objectives.shapes import ObjectiveShape, shape_of

FirstStep = Callable[[int, str], int]
"""(amount, unit "steps" or "tokens") -> the first step (from 1) that begins when so much was consumed."""

Phases = Sequence[tuple[int, dict[str, Any]]]
"""(first step, settings of one objective), ascending; the first phase begins at step 1."""

_OF_SCHEDULES = ("block_schedule", "block_schedule_unit", "complementary_until_tokens")
_OF_MASKED = ("noise_schedule", "noise_exponent", "complementary", "mask_logit", "z_loss_weight", "isolate_documents")


def phases_of(settings: Mapping[str, Any], sequence_length: int, first_step: FirstStep) -> Phases:
    """The phases of some settings by name: those of a config section, or of a run's record.

    A phase of one block a row is masked diffusion: nothing reads a clean half, so that it is left out.
    """
    unit = settings.get("block_schedule_unit", "steps")
    sizes = [
        (first_step(start, unit), size)
        for start, size in block_phases(settings.get("block_schedule") or (), sequence_length)
    ]
    until = settings.get("complementary_until_tokens")
    end_of_pair = None if until is None or not settings.get("complementary") else first_step(until, "tokens")
    starts = {1} | {first for first, _ in sizes} | (set() if end_of_pair is None else {end_of_pair})
    phases = []
    for start in sorted(starts):
        current = {name: value for name, value in settings.items() if name not in _OF_SCHEDULES}
        if end_of_pair is not None and start >= end_of_pair:
            current["complementary"] = False
        if sizes:
            size = [size for first, size in sizes if first <= start][-1]
            current = _of_size(current, size, sequence_length)
        phases.append((start, current))
    return phases


def at_step(phases: Phases, step: int) -> dict[str, Any]:
    """The settings of a step (from 1)."""
    return [settings for first, settings in phases if first <= step][-1]


def largest_shape(phases: Phases, sequence_length: int) -> ObjectiveShape:
    """The shape of the phase with the most positions; memory and time of a run are planned for it."""
    shapes = [shape_of(settings, sequence_length) for _, settings in phases]
    return max(shapes, key=lambda shape: (shape.num_views * shape.input_length, shape.scored_positions))


def _of_size(settings: dict[str, Any], size: int, sequence_length: int) -> dict[str, Any]:
    if size < sequence_length:
        return settings | {"block_size": size}
    return {"name": "masked"} | {name: settings[name] for name in _OF_MASKED if name in settings}
