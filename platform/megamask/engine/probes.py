"""Capabilities of the machine under a run that planning and metrics need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import shutil
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch

from megamask.errors import UsageError
from megamask.planning.capability import Capability, problems

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig

# Dense peaks without sparsity, for float32 without TF32 (torch's default for its matrices), from the vendor's data
# sheets, FLOP/s of one device. The key is a part of the device's name; the first that fits holds.
_PEAKS = {
    "fp32": (
        *(("H200 NVL", 60e12), ("H200", 66.9e12)),
        *(("H100 NVL", 60e12), ("H100 PCIe", 51.2e12), ("H100", 66.9e12)),
        ("A100", 19.5e12),
    ),
    "bf16": (
        *(("H200 NVL", 835.5e12), ("H200", 989.5e12)),
        *(("H100 NVL", 835.5e12), ("H100 PCIe", 756e12), ("H100", 989.5e12)),
        ("A100", 312e12),
    ),
}

# the library's own check of each recipe
_LIBRARY_CHECKS = {
    "tensorwise": "check_fp8_support",
    "delayed": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}


def peak_flops_per_second(device_name: str, compute: str) -> float | None:
    """The named peak of one device that mfu is a share of.

    Args:
        device_name: as torch.cuda.get_device_name returns it.
        compute: precision.compute.

    Returns: FLOP/s, or None where no data sheet names it (any CPU, other devices, other formats).
    """
    return next((peak for part, peak in _PEAKS.get(compute, ()) if part in device_name), None)


def device_name(device: torch.device) -> str:
    """The device's name: the GPU's own, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def capability() -> Capability:
    """Return what this process finds: GPU, CUDA, Transformer Engine, apex."""
    has_gpu = torch.cuda.is_available()
    return Capability(
        architecture=torch.cuda.get_device_capability() if has_gpu else None,
        cuda=_cuda_version(),
        transformer_engine=_version("transformer_engine"),
        apex=apex(),
        missing_compiler=missing_compiler(),
    )


def check_machine(config: TrainConfig) -> None:
    """Refuse settings that this machine cannot carry out, before anything is started.

    Raises:
        UsageError: key and value, reason, allowed values.
    """
    found = capability()
    for problem in problems(config.precision, config.device, found, num_experts=config.model.num_experts):
        reply = own_reason(config.precision.fp8) if problem.key == "precision.fp8" and found.can_run_te else None
        raise UsageError(
            f"{problem.description(reduce(getattr, problem.key.split('.'), config))}. Nothing was started.",
            hint=f"change {problem.key}" + ("" if reply is None else f"; Transformer Engine itself answers: {reply}"),
        )


def own_reason(recipe: str) -> str | None:
    """Transformer Engine's own words why a recipe cannot run on this GPU; None where it can or gives none."""
    library = importlib.import_module("transformer_engine.pytorch.quantization")
    is_supported, reason = getattr(library, _LIBRARY_CHECKS[recipe])()
    return None if is_supported else reason or None


def apex() -> Literal["present", "absent", "unrelated"]:
    """Return whether NVIDIA's apex is installed.

    It is known by its compiled extensions: the package index has another, unrelated package of that name, which
    megatron-core takes for it and then fails.
    """
    if importlib.util.find_spec("amp_C") and importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        return "present"
    return "absent" if importlib.util.find_spec("apex") is None else "unrelated"


def missing_compiler() -> str | None:
    """Return what device.kernels=compiled lacks on this machine, as the rest of a sentence; None if it can run."""
    if not torch.cuda.is_available():
        return "there is no GPU; on a CPU the plain kernels are the ones that are tested"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    names = ("cc", "gcc", "clang")
    if not any(map(shutil.which, names)):
        return f"Triton needs a C compiler, and none is found under the names {', '.join(names)}"
    return None


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cuda_version() -> tuple[int, int] | None:
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)
