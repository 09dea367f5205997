"""Arithmetic of the device."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Choices that concern the machine, not the result that is sought."""

    deterministic: bool = operational(
        "the same layout on the same GPU type repeats a run bit for bit; false lets the libraries choose faster "
        "kernels whose sums have no fixed order. On a CPU every run repeats itself, whatever is set",
        default=True,
    )
