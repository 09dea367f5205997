"""The figures that a plan cannot know, each with its default, unit and reason; a user may replace every one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megamask.errors import UsageError


def _assumed(doc: str, default: float) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Figures that a plan cannot know; all are positive numbers."""

    matrix_efficiency: float = _assumed("part of the peak rate that a matrix product of a layer reaches", 0.68)
    fp8_efficiency: float = _assumed("the same of an FP8 product, quantisation included", 0.50)
    half_rate_rows: float = _assumed("rows of a matrix product at which it reaches half of that efficiency", 256.0)
    attention_efficiency: float = _assumed("part of the peak rate that the attention kernel reaches", 0.45)
    memory_efficiency: float = _assumed("part of the memory bandwidth that element-wise work reaches", 0.75)
    link_efficiency: float = _assumed("part of a link's bandwidth that a collective reaches", 0.75)
    collective_latency_s: float = _assumed("seconds that every collective costs beside its bytes", 20e-6)
    overlapped_part: float = _assumed(
        "part of the data-parallel communication that hides behind computing where overlap is on", 0.8
    )
    context_bytes: float = _assumed("bytes of CUDA's context and libraries on a GPU", 3.0e9)
    communicator_bytes: float = _assumed("bytes of NCCL's buffers for each group of ranks on a GPU", 0.25e9)
    fragmentation: float = _assumed("part of the activations that the allocator loses to gaps", 0.05)
    reserve: float = _assumed("part of the memory that a plan leaves free", 0.03)
    host_copy_bandwidth: float = _assumed("bytes per second from a GPU to its host's memory", 20e9)
    storage_bandwidth: float = _assumed("bytes per second that a node writes to the shared storage", 2e9)
    storage_total_bandwidth: float = _assumed("bytes per second that the storage takes from all nodes together", 100e9)
    failures_per_node_day: float = _assumed(
        "failures that end a job, per node and day (Llama 3: 419 unexpected in 54 days on 2,048 nodes, 0.0038)", 0.0038
    )
    restart_s: float = _assumed("seconds from a failure to the first step of the next attempt", 600.0)

    @classmethod
    def with_overrides(cls, overrides: Sequence[str]) -> Assumptions:
        """Replace defaults by `name=number` arguments.

        Raises:
            UsageError: an unknown name, not a number, or one that is not positive.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        values: dict[str, float] = {}
        for override in overrides:
            name, _, text = override.partition("=")
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else None
                raise _refused(override, f"no such assumption; allowed: {', '.join(names)}", hint)
            try:
                values[name] = float(text)
            except ValueError:
                raise _refused(override, "not a number; allowed: name=number", None) from None
            if not 0 < values[name] < float("inf"):
                raise _refused(override, "allowed: a number above 0", None)
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Each assumption's value and meaning, by name."""
        return {
            item.name: {"value": getattr(self, item.name), "meaning": item.metadata["doc"]}
            for item in dataclasses.fields(self)
        }


def changed(assumptions: Assumptions) -> Mapping[str, float]:
    """The assumptions that differ from their defaults."""
    return {
        item.name: getattr(assumptions, item.name)
        for item in dataclasses.fields(assumptions)
        if getattr(assumptions, item.name) != item.default
    }


def _refused(override: str, problem: str, hint: str | None) -> UsageError:
    return UsageError(f"--assume {override}: {problem}. Nothing was planned.", hint=hint)
