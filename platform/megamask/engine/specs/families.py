"""The choice of a layer family."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol, cast

from megamask.engine.backend import Backend
from megamask.engine.specs.base import Part
from megamask.errors import UsageError
from megamask.models.spec import ModelSpec


class LayerFamily(Protocol):
    """The functions that a module of this folder provides (base.py)."""

    def block_spec(
        self, config: Any, num_layers: int, *, rope_theta: float, rotary_channels: int, attention: str = "sdpa"
    ) -> Any:
        """megatron-core's specification of a stage's layers and of the final norm.

        Args:
            attention: "sdpa", or "te" where the family has it.
        """

    def layer_parameters(self, spec: ModelSpec) -> dict[str, Part]:
        """Parts of a layer's parameters, by their names in the layer."""


def layer_family(name: str, backend: Backend) -> LayerFamily:
    """The family of that name: "local", "te" or "emulated".

    Raises:
        UsageError: it cannot run on this machine.
    """
    if name == "te":
        check_transformer_engine(
            backend,
            "device.layers is 'te'",
            allowed="local",
            hint="set device.layers=local; checkpoints of the two kinds of layers load into each other",
        )
    return cast(LayerFamily, importlib.import_module(f"megamask.engine.specs.{name}"))


def groups_experts(choice: str, backend: Backend) -> bool:
    """Return whether the experts of a layer are one grouped matrix product, by device.experts.

    Raises:
        UsageError: they are to be, and cannot on this machine.
    """
    if choice != "grouped":
        return False
    check_transformer_engine(
        backend, "device.experts is 'grouped'", allowed="auto, sequential", hint="set device.experts=sequential"
    )
    return True


def check_transformer_engine(backend: Backend, setting: str, *, allowed: str, hint: str) -> None:
    """Refuse Transformer Engine's modules where they cannot run.

    Args:
        setting: what asks for them, as the start of a sentence.
        allowed: values of the setting that can run here.
        hint: what to set instead.

    Raises:
        UsageError: the library is not installed, or the process computes on the CPU.
    """
    reason = None
    if importlib.util.find_spec("transformer_engine") is None:
        reason = "Transformer Engine is not installed"
    elif backend.name != "cuda":
        reason = "this process sees no GPU, and Transformer Engine computes on nothing else"
    if reason:
        raise UsageError(
            f"{setting}, but {reason}; allowed here: {allowed}. Nothing was trained.",
            hint=hint,
        )
