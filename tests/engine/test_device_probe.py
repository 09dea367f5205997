"""The process that asks each GPU for a product: its answers, and a device that takes no work."""

from __future__ import annotations

import threading

import pytest
import torch

from megamask.engine import device_probe
from megamask.resilience.preflight.finding import Finding

CPU = torch.device("cpu")


def test_each_device_answers() -> None:
    assert [answer["outcome"] for answer in device_probe.probe([CPU, CPU])] == ["pass", "pass"]


def test_error_of_a_driver_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> Finding:
        raise RuntimeError("CUDA error: an uncorrectable ECC error was encountered\nCompile with ...")

    monkeypatch.setattr(device_probe, "known_bits", refuse)
    assert device_probe.probe([CPU]) == [
        {"device": "cpu", "outcome": "fail", "message": "CUDA error: an uncorrectable ECC error was encountered"}
    ]


def test_device_that_takes_no_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(device: torch.device) -> Finding:
        over.wait(60)
        return Finding(outcome="pass", message="late")

    monkeypatch.setattr(device_probe, "PRODUCT_S", 0.2)
    monkeypatch.setattr(device_probe, "known_bits", hang)
    try:
        [answer] = device_probe.probe([CPU])
    finally:
        over.set()
    assert (answer["outcome"], answer["message"]) == ("fail", "no answer to a product within 0.2 s")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a build with CUDA")
def test_build_without_cuda_sees_no_gpu_and_no_fault() -> None:
    assert device_probe.visible() == ([], None)
