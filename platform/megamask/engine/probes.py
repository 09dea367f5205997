"""What the device under a run can do, as far as planning and metrics need it."""

from __future__ import annotations

import torch

# Dense FP32 peaks without sparsity and without TF32 (torch's default for matrices in float32), from the vendor's data
# sheets, FLOP/s of one device. The key is a part of the device's name; the first that fits holds.
_FP32_PEAKS = (("H200", 66.9e12), ("H100 PCIe", 51.2e12), ("H100", 66.9e12), ("A100", 19.5e12))


def peak_flops_per_second(device_name: str, compute: str) -> float | None:
    """The named peak of one device that mfu is a share of.

    Args:
        device_name: as torch.cuda.get_device_name tells it.
        compute: precision.compute.

    Returns: FLOP/s, or None where no data sheet says (any CPU, other devices, other formats).
    """
    if compute != "fp32":
        return None
    return next((peak for part, peak in _FP32_PEAKS if part in device_name), None)


def device_name(device: torch.device) -> str:
    """The device's name: the GPU's own, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
