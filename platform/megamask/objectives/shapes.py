"""Sizes that an objective gives to a step, in integers: what planning and audit know of an objective without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

DEFAULT_NAME = "masked"
"""The objective of a record that names none: records from before objectives had names."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveShape:
    """Sizes of what one sample becomes.

    Args:
        num_views: rows of the network for each sample.
        input_length: positions of each of those rows.
        scored_positions: most positions of all views of a sample that are scored, so the rows of the head.
        scored_fraction: part of the network's positions that is scored, on average.
        attended_fraction: part of a row's positions that a position sees, on average.
        corrupts: tokens that some view corrupts: "all" eligible ones of a sample, each in exactly one view, "some" of
            them, or "none".
    """

    num_views: int
    input_length: int
    scored_positions: int
    scored_fraction: float
    attended_fraction: float
    corrupts: Literal["all", "some", "none"]


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of the objective that these settings are of."""
    return str(settings.get("name", DEFAULT_NAME))


def shape_of(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    """The shape of an objective, from its settings by name: a config section, a run's record or a model's.

    Raises:
        KeyError: no such objective.
    """
    return _SHAPES[name_of(settings)](settings, sequence_length)


def _masked(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    is_pair = bool(settings["complementary"])
    return ObjectiveShape(
        num_views=2 if is_pair else 1,
        input_length=sequence_length,
        scored_positions=sequence_length,  # of a pair too: what one view masks, the other leaves
        scored_fraction=0.5,
        attended_fraction=1.0,
        corrupts="all" if is_pair else "some",
    )


def _autoregressive(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    return ObjectiveShape(
        num_views=1,
        input_length=sequence_length,
        scored_positions=sequence_length,
        scored_fraction=1.0,
        attended_fraction=0.5,
        corrupts="none",
    )


def _block(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    is_joint = settings["diffusion_weight"] is not None  # the clean half is scored too, in one view
    is_pair = bool(settings.get("complementary"))
    views = 2 if is_pair else 1
    scored = (1.0 if is_pair else 0.5) + (1.0 if is_joint else 0.0)  # rows of s tokens, on average
    return ObjectiveShape(
        num_views=views,
        input_length=2 * sequence_length,
        scored_positions=(2 if is_joint else 1) * sequence_length,
        scored_fraction=scored / (2 * views),
        attended_fraction=0.5,  # of the 2s keys a noised position sees s/2 on average, a clean one s/2 as well
        corrupts="all" if is_pair else "some",
    )


def _uniform(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    return ObjectiveShape(
        num_views=1,
        input_length=sequence_length,
        scored_positions=sequence_length,
        scored_fraction=1.0,
        attended_fraction=1.0,
        corrupts="some",
    )


def _mixed(settings: Mapping[str, Any], sequence_length: int) -> ObjectiveShape:
    everywhere = _uniform(settings, sequence_length)
    if settings["corruption"] != "edit":
        return everywhere
    return replace(everywhere, scored_fraction=0.5 + 0.5 * settings["edit_fraction"])


_SHAPES: dict[str, Callable[[Mapping[str, Any], int], ObjectiveShape]] = {
    "masked": _masked,
    "autoregressive": _autoregressive,
    "block": _block,
    "uniform": _uniform,
    "mixed": _mixed,
}
