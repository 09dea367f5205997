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
        check_transformer_engine(backend)
    return cast(LayerFamily, importlib.import_module(f"megamask.engine.specs.{name}"))


def check_transformer_engine(backend: Backend) -> None:
    """Refuse Transformer Engine's layers where they cannot run.

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
            f"device.layers is 'te', but {reason}; allowed here: local. Nothing was trained.",
            hint="set device.layers=local; checkpoints of the two kinds of layers load into each other",
        )
