"""Number formats and layers that a machine can run: one pure table, read before a device is booked.

The caller states what was found (engine/probes.py) or what is planned; nothing here looks at a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megamask.config.rules.problem import Problem
from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.precision import PrecisionConfig

Version = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Architecture and libraries of a machine.

    Args:
        architecture: compute capability of its GPUs, as (9, 0) for Hopper; None without one.
        cuda: version of CUDA that torch was built for.
        transformer_engine: version of Transformer Engine; None where it is not installed.
        apex: whether NVIDIA's apex is installed; "unrelated" for another package of that name.
    """

    architecture: Version | None = None
    cuda: Version | None = None
    transformer_engine: str | None = None
    apex: Literal["present", "absent", "unrelated"] = "absent"

    @property
    def can_run_te(self) -> bool:
        """True if Transformer Engine's layers can run."""
        return self.transformer_engine is not None and self.architecture is not None


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """Requirements of the kernels of a recipe: architectures from `first` up to, but not including, `beyond`."""

    first: Version
    beyond: Version | None = None
    cuda: Version | None = None


# Of Transformer Engine 2.20.2: check_fp8_support, check_fp8_block_scaling_support, check_mxfp8_support.
_KERNELS: Mapping[str, _Needs] = {
    "tensorwise": _Needs(first=(8, 9)),
    "delayed": _Needs(first=(8, 9)),
    "blockwise": _Needs(first=(9, 0), cuda=(12, 9)),
    "mxfp8": _Needs(first=(10, 0), beyond=(12, 0)),
}
RECIPES = tuple(_KERNELS)
EMULATED = ("tensorwise", "delayed", "blockwise")


def refusal(recipe: str, capability: Capability) -> str | None:
    """Return why the kernels of an FP8 recipe cannot run there, as the rest of a sentence; None if they can."""
    if capability.transformer_engine is None:
        return "Transformer Engine is not installed"
    if capability.architecture is None:
        return "there is no GPU, and Transformer Engine computes on nothing else"
    needs, found = _KERNELS[recipe], _dotted(capability.architecture)
    if capability.architecture < needs.first:
        return f"its kernels need compute capability {_dotted(needs.first)} or higher, and the GPU's is {found}"
    if needs.beyond is not None and capability.architecture >= needs.beyond:
        return f"Transformer Engine has no kernels for it from compute capability {_dotted(needs.beyond)} on"
    if needs.cuda is not None and (capability.cuda is None or capability.cuda < needs.cuda):
        built = "without CUDA" if capability.cuda is None else f"for CUDA {_dotted(capability.cuda)}"
        return f"its kernels need CUDA {_dotted(needs.cuda)} or higher, and torch was built {built}"
    return None


def allowed_recipes(capability: Capability) -> list[str]:
    """FP8 recipes whose kernels can run there."""
    return [recipe for recipe in RECIPES if refusal(recipe, capability) is None]


def chosen_layers(precision: PrecisionConfig, device: DeviceConfig, capability: Capability) -> str:
    """The layer family that a config means on a machine: "te", "local" or "emulated"."""
    if precision.fp8 != "none" and precision.fp8_kernels == "emulate":
        return "emulated"
    if device.layers != "auto":
        return device.layers
    return "te" if capability.can_run_te else "local"


def problems(precision: PrecisionConfig, device: DeviceConfig, capability: Capability) -> Iterator[Problem]:
    """Settings that a machine cannot carry out."""
    if precision.fp8 != "none" and precision.fp8_kernels == "te":
        reason = refusal(precision.fp8, capability)
        if reason is not None:
            yield Problem(
                key="precision.fp8",
                because=f"but {reason}",
                allowed=", ".join(["none", *allowed_recipes(capability)])
                + f"; or {', '.join(EMULATED)} with precision.fp8_kernels=emulate",
            )
    if device.layers == "te" and not capability.can_run_te:
        missing = "Transformer Engine is not installed"
        if capability.transformer_engine is not None:
            missing = "there is no GPU, and Transformer Engine computes on nothing else"
        yield Problem(
            key="device.layers",
            because=f"but {missing}",
            allowed="auto, local; checkpoints of both kinds of layers load into each other",
        )
    if device.attention == "te" and chosen_layers(precision, device, capability) != "te":
        yield Problem(
            key="device.attention",
            because="but the layers are not Transformer Engine's",
            allowed="auto, sdpa; or te with device.layers=te on a machine that has it",
        )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
