"""Choice of kernels where a GPU would wait for many small ones: made once, then set on the modules.

Each choice is a setting of its own, so that its part of a step's time can be measured alone. A CPU keeps the plain
kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamask.config.schema.device import DeviceConfig
from megamask.engine.backend import Backend
from megamask.engine.layers import compiled
from megamask.engine.layers.attention import RotaryAttention
from megamask.engine.layers.feed_forward import FeedForward
from megamask.engine.probes import missing_compiler


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Choices of one engine.

    Args:
        is_compiled: rotary positions and SwiGLU are one kernel each way, and on a GPU the noise's words one kernel.
        shares_keys: queries of a group read one copy of its keys and values.
        adds_weight_gradients: Transformer Engine's products add weight gradients to the float32 buffers.
    """

    is_compiled: bool
    shares_keys: bool
    adds_weight_gradients: bool

    @classmethod
    def chosen(cls, device: DeviceConfig, backend: Backend) -> Kernels:
        """The kernels that the settings mean on this machine."""
        has_gpu = backend.device.type == "cuda"
        is_compiled = device.kernels == "compiled"
        if device.kernels == "auto":
            is_compiled = missing_compiler() is None
        return cls(
            is_compiled=is_compiled,
            shares_keys=device.grouped_queries == "shared" or (device.grouped_queries == "auto" and has_gpu),
            adds_weight_gradients=device.weight_gradients != "separate",
        )

    def install(self, networks: Sequence[torch.nn.Module], backend: Backend) -> None:
        """Set the choices on the modules of this rank's stages."""
        for module in itertools.chain.from_iterable(network.modules() for network in networks):
            if isinstance(module, RotaryAttention):
                module.shares_keys = self.shares_keys
            if isinstance(module, FeedForward) or hasattr(module, "rotary_channels"):
                setattr(module, "is_compiled", self.is_compiled)  # noqa: B010 - typed as a submodule
            if hasattr(module, "fuse_wgrad_accumulation"):  # a linear module of Transformer Engine
                # read in the forward pass
                setattr(module, "fuse_wgrad_accumulation", self.adds_weight_gradients)  # noqa: B010
        makes_noise = self.is_compiled and backend.device.type == "cuda"
        (compiled.compile_noise if makes_noise else compiled.plain_noise)(backend.device)
