"""Checks of a device: exact products, rates that are numbers, a sum over two processes."""

from __future__ import annotations

import pytest
import torch

from megamask.engine import device_checks

CPU = torch.device("cpu")


def test_exact_products_pass_and_a_wrong_entry_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_checks.known_bits(CPU).outcome == "pass"
    product = torch.Tensor.__matmul__

    def broken(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = product(left, right)
        if found.dtype == torch.bfloat16:
            found[3, 5] += 1
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    found = device_checks.known_bits(CPU)
    assert found.outcome == "fail" and found.values["wrong"] == 1 and "bf16" in found.message


@pytest.mark.parametrize("number_format", [torch.float32, torch.bfloat16])
def test_rates_are_positive(number_format: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_checks, "_SMALL_SIZE", 64)
    monkeypatch.setattr(device_checks, "_SMALL_COPY_BYTES", 1 << 16)
    assert device_checks.product_rate(CPU, number_format).values["flops_per_s"] > 0
    assert device_checks.copy_rate(CPU).values["bytes_per_s"] > 0


def test_fp8_products_are_measured_where_there_are_units_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_checks.fp8_product_rate(CPU).outcome == "skip"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found = device_checks.fp8_product_rate(torch.device("cuda"))
    assert found.outcome == "skip" and "8.0 has no FP8 units" in found.message


def test_links_need_two_gpus() -> None:
    assert device_checks.peer_rates([CPU]).outcome == "skip"


@pytest.mark.multiprocess
def test_two_processes_sum_exactly() -> None:
    found = device_checks.all_reduce()
    assert found.outcome == "pass", found.message
    assert found.values["ranks"] == 2 and found.values["bytes_per_s"] > 0
