"""Learning-rate factors by pattern (`optimizer.lr_multipliers`), looked up by canonical name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megamask.engine.canonical import TensorSlice
from megamask.errors import UsageError
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec


def check_patterns(multipliers: Sequence[tuple[str, float]], spec: ModelSpec) -> None:
    """Refuse a pattern that fits no tensor of the network.

    Raises:
        UsageError: names the pattern and some tensors.
    """
    names = list(canonical_shapes(spec))
    for pattern, _ in multipliers:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"optimizer.lr_multipliers: the pattern {pattern} fits no tensor of the network. Nothing was started.",
                hint=f"tensors are called {', '.join(names[:3])}, ..., {names[-1]}; * matches any letters",
            )


def multiplier_of(name: str, slices: Sequence[TensorSlice], multipliers: Sequence[tuple[str, float]]) -> float:
    """The factor of a local parameter: that of the last pattern that fits its canonical tensors, else 1.

    Args:
        name: of the local parameter, for the message.

    Raises:
        UsageError: the parameter holds several canonical tensors, and their factors differ.
    """
    factors = {each.name: _factor(each.name, multipliers) for each in slices}
    if len(set(factors.values())) > 1:
        listed = ", ".join(f"{tensor}: {factor:g}" for tensor, factor in sorted(factors.items()))
        raise UsageError(
            f"optimizer.lr_multipliers gives different factors to tensors that are kept as one parameter, {name} "
            f"({listed}). Nothing was started.",
            hint="write a pattern that fits all of them",
        )
    return next(iter(factors.values()), 1.0)


def _factor(name: str, multipliers: Sequence[tuple[str, float]]) -> float:
    return next((factor for pattern, factor in reversed(multipliers) if fnmatchcase(name, pattern)), 1.0)
