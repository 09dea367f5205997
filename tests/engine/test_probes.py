"""Peaks are named or unknown, never guessed."""

from __future__ import annotations

import pytest
import torch

from megamask.engine.probes import device_name, peak_flops_per_second


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 66.9e12),
        ("NVIDIA H100 80GB HBM3", 66.9e12),
        ("NVIDIA H100 PCIe", 51.2e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12),
        ("cpu", None),
        ("Some Other Device", None),
    ],
)
def test_fp32_peak_is_the_data_sheet_s_or_unknown(name: str, peak: float | None) -> None:
    assert peak_flops_per_second(name, "fp32") == peak


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_bf16_peak_is_the_data_sheets_dense_one_or_unknown(name: str, peak: float | None) -> None:
    assert peak_flops_per_second(name, "bf16") == peak


def test_peak_of_another_format_is_unknown() -> None:
    assert peak_flops_per_second("NVIDIA H200", "fp8") is None


def test_cpu_is_named_cpu() -> None:
    assert device_name(torch.device("cpu")) == "cpu"
