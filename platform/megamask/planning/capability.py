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
        missing_compiler: what device.kernels=compiled lacks; None where nothing is missing.
    """

    architecture: Version | None = None
    cuda: Version | None = None
    transformer_engine: str | None = None
    apex: Literal["present", "absent", "unrelated"] = "absent"
    missing_compiler: str | None = None

    @property
    def can_run_te(self) -> bool:
        """True if Transformer Engine's layers can run."""
        return self.transformer_engine is not None and self.architecture is not None


def planned(architecture: Version) -> Capability:
    """The capability of a GPU that is planned, with the software that the extra `gpu` installs."""
    return Capability(architecture=architecture, cuda=(12, 9), transformer_engine="assumed")


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


def chosen_layers(
    precision: PrecisionConfig, device: DeviceConfig, capability: Capability, *, num_experts: int = 0
) -> str:
    """The layer family that a config means on a machine: "te", "local" or "emulated".

    Args:
        num_experts: model.num_experts; Transformer Engine's layers have none, so `auto` is local where there are any.
    """
    if precision.fp8 != "none" and precision.fp8_kernels == "emulate":
        return "emulated"
    if device.layers != "auto":
        return device.layers
    return "te" if capability.can_run_te and num_experts == 0 else "local"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that a run may use.

    Args:
        reason: why it is off; None where it is on.
    """

    name: str
    reason: str | None


def features(capability: Capability) -> list[Feature]:
    """Layers and optimizer of a run with default settings, and the number formats that one may ask for."""
    te_reason = None
    if not capability.can_run_te:
        te_reason = refusal("tensorwise", capability)
    rows = {
        "GPU": None if capability.architecture is not None else "no GPU is visible to torch",
        "Transformer Engine layers (device.layers=auto)": te_reason,
        "Transformer Engine attention (device.attention=te)": te_reason,
        "Transformer Engine grouped experts (device.experts=grouped)": te_reason,
        "fused Adam": te_reason,
        **{f"FP8 {recipe} (precision.fp8={recipe})": refusal(recipe, capability) for recipe in RECIPES},
        "FP8 emulated (precision.fp8_kernels=emulate)": None,
        "apex": _APEX[capability.apex],
    }
    return [Feature(name=name, reason=reason) for name, reason in rows.items()]


_APEX: Mapping[str, str | None] = {
    "present": None,
    "absent": "not installed; nothing needs it",
    "unrelated": "another package of that name is installed; it is not used: pip uninstall apex",
}


def problems(
    precision: PrecisionConfig, device: DeviceConfig, capability: Capability, *, num_experts: int = 0
) -> Iterator[Problem]:
    """Settings that a machine cannot carry out; `num_experts` as for `chosen_layers`."""
    if precision.fp8 != "none" and precision.fp8_kernels == "te":
        reason = refusal(precision.fp8, capability)
        if reason is not None:
            yield Problem(
                key="precision.fp8",
                because=f"but {reason}",
                allowed=", ".join(["none", *allowed_recipes(capability)])
                + f"; or {', '.join(EMULATED)} with precision.fp8_kernels=emulate",
            )
    for key, is_asked, others in (
        ("device.layers", device.layers == "te", "auto, local; checkpoints of both kinds of layers"),
        ("device.experts", device.experts == "grouped", "auto, sequential; checkpoints of both"),
    ):
        if is_asked and not capability.can_run_te:
            missing = "Transformer Engine is not installed"
            if capability.transformer_engine is not None:
                missing = "there is no GPU, and Transformer Engine computes on nothing else"
            yield Problem(key=key, because=f"but {missing}", allowed=f"{others} load into each other")
    if device.kernels == "compiled" and capability.missing_compiler is not None:
        yield Problem(
            key="device.kernels",
            because=f"but {capability.missing_compiler}",
            allowed="auto, plain",
        )
    if (
        device.weight_gradients != "auto"
        and chosen_layers(precision, device, capability, num_experts=num_experts) != "te"
    ):
        yield Problem(
            key="device.weight_gradients",
            because="but the layers are not Transformer Engine's, the only ones that have a choice",
            allowed="auto; or another value with device.layers=te on a machine that has it",
        )
    if device.cuda_graphs and chosen_layers(precision, device, capability, num_experts=num_experts) != "te":
        yield Problem(
            key="device.cuda_graphs",
            because="but the layers are not Transformer Engine's, the only ones that have graphs",
            allowed="false; or true on a machine that has the library and a GPU",
        )
    if device.attention == "te" and chosen_layers(precision, device, capability, num_experts=num_experts) != "te":
        has_experts = num_experts > 0 and capability.can_run_te
        yield Problem(
            key="device.attention",
            because="but the layers are not Transformer Engine's"
            + (f": model.num_experts is {num_experts}, and those have no experts" if has_experts else ""),
            allowed="auto, sdpa" + ("" if has_experts else "; or te with device.layers=te on a machine that has it"),
        )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
