"""`python -m megamask.engine.device_probe [DEVICE...]`: a product with known bits on each GPU, as one JSON list.

A GPU has no limit for its start, since the process that asks has one, but few seconds for its product: one that takes
no work differs from a node that is slow to load its libraries.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence

import torch

from megamask.engine.device_checks import known_bits
from megamask.resilience.preflight.finding import Finding

PRODUCT_S = 8.0
_POLL_S = 0.02


class _Probe:
    """The question to one device, in a thread of its own: a call into a driver cannot be interrupted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.finding: Finding | None = None
        self._begun_at: float | None = None
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        try:
            torch.ones(1, device=self.device).item()  # the context, and the first kernel
            self._begun_at = time.monotonic()
            self.finding = known_bits(self.device)
        except Exception as error:  # noqa: BLE001  whatever a driver raises is its answer
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.finding = Finding(outcome="fail", message=reason)

    def is_over(self) -> bool:
        """Return whether the device has answered, or had its time."""
        if self.finding is None and self._begun_at is not None and time.monotonic() > self._begun_at + PRODUCT_S:
            self.finding = Finding(outcome="fail", message=f"no answer to a product within {PRODUCT_S:g} s")
        return self.finding is not None


def probe(devices: Sequence[torch.device]) -> list[dict[str, str]]:
    """Ask each device for the product; return device, outcome and message of each."""
    probes = [_Probe(device) for device in devices]
    while not all(each.is_over() for each in probes):
        time.sleep(_POLL_S)
    return [
        {"device": str(each.device), "outcome": each.finding.outcome, "message": each.finding.message}
        for each in probes
        if each.finding is not None
    ]


def visible() -> tuple[list[torch.device], str | None]:
    """Return the GPUs that torch sees, and why it sees none where the driver refuses."""
    if torch.version.cuda is None:
        return [], None  # a build for CPUs: no run would use a GPU here
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return [], str(error).strip().splitlines()[0]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())], None


def main(names: Sequence[str]) -> None:
    """Print what the named devices answer, or all GPUs."""
    refusal = None
    devices = [torch.device(name) for name in names]
    if not devices:
        devices, refusal = visible()
    found = probe(devices)
    if refusal is not None:
        found.append({"device": "cuda", "outcome": "fail", "message": refusal})
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a thread inside a driver would keep the process


if __name__ == "__main__":
    main(sys.argv[1:])
