"""Arithmetic of the device."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational
from megamask.config.schema.section import Section


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Choices that concern the machine, not the result that is sought."""

    layers: str = operational(
        "modules of the layers: local are megatron-core's and run on any device, te are Transformer Engine's and need "
        "a GPU; checkpoints load into both",
        default="local",
        choices=("local", "te"),
    )
    deterministic: bool = operational(
        "the same layout on the same GPU type repeats a run bit for bit; false lets the libraries choose faster "
        "kernels whose sums have no fixed order. On a CPU every run repeats itself, for either value",
        default=True,
    )
