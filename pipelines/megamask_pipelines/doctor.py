"""The job of `megamask doctor`: versions, checks of host and device, and which features are on here."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from megamask.engine import probes
from megamask.engine.device_checks import device_checks
from megamask.errors import ExitCode
from megamask.planning import capability
from megamask.resilience.preflight.finding import answers
from megamask.resilience.preflight.host import host_checks
from megamask.resilience.process_facts import node_name

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "tokenizers",
    "webdataset",
    "mlflow-skinny",
    "mlflow",
)


def examine(folder: Path, *, with_device: bool = True, needed_bytes: int = 1 << 30) -> dict[str, Any]:
    """Examine this machine.

    Args:
        folder: where runs would be kept.
        with_device: whether to look at devices too.

    Returns: node, fit (no check failed), versions, features, checks [{name, outcome, message, values, seconds}], and
        exit_code 70 when a check failed.
    """
    checks = host_checks(folder, needed_bytes=needed_bytes)
    if with_device:
        checks += device_checks()
    found = [
        {
            "name": answer.name,
            "outcome": answer.finding.outcome,
            "message": answer.finding.message,
            "values": answer.finding.values,
            "seconds": round(answer.seconds, 3),
        }
        for answer in answers(checks)
    ]
    is_fit = all(check["outcome"] != "fail" for check in found)
    return {
        "node": node_name(),
        "fit": is_fit,
        "versions": versions(),
        "features": features(),
        "checks": found,
        **({} if is_fit else {"exit_code": int(ExitCode.HARDWARE)}),
    }


def versions() -> dict[str, str | None]:
    """Version of Python and of each library; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def features() -> list[dict[str, Any]]:
    """Features of a run here (planning/capability.py): name, is_on, and the reason where it is off."""
    found = capability.features(probes.capability())
    return [{"name": each.name, "is_on": each.reason is None, "reason": each.reason} for each in found]
