"""Capabilities of the device under a run that planning and metrics need."""

from __future__ import annotations

import torch

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
