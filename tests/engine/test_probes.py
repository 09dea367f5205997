"""Peaks are named or unknown, never guessed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from megamask.config.load import load_train_config
from megamask.engine import probes
from megamask.engine.probes import device_name, peak_flops_per_second
from megamask.errors import UsageError
from megamask.planning.capability import planned
from support.command import TINY


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


@pytest.mark.promise("a refused FP8 recipe names the reason, the allowed recipes and the key")
def test_refusal_quotes_the_librarys_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("transformer_engine.pytorch.quantization")
    library.check_mxfp8_support = lambda: (False, "not on this card, says the library")
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(probes, "capability", lambda: planned((9, 0)))
    config = load_train_config(str(TINY), ["precision.compute=bf16", "precision.fp8=mxfp8"]).config
    with pytest.raises(UsageError, match=r"precision\.fp8 is 'mxfp8', but its kernels need .* 10\.0") as error:
        probes.check_machine(config)
    assert "not on this card, says the library" in str(error.value.hint)
