"""FP8 at run time: which recipe quantises which layer, calibration, and the state that a checkpoint keeps.

Only delayed scaling has a state: a history of magnitudes and a scale for each operand of each product. On disk it is
two float32 tensors, FP8_HISTORY and FP8_SCALE, whose rows count layers, products of a layer and operands. It is the
same on all tensor-parallel and data-parallel ranks, so it does not depend on the layout.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamask.config.schema.precision import PrecisionConfig
from megamask.engine.layers.fp8_linear import Blockwise, Delayed, Emulated, Quantization, Tensorwise
from megamask.engine.layers.fp8_state import ALL, OPERANDS, DelayedScales, Scales, end_pass
from megamask.engine.mesh import Mesh
from megamask.engine.network import DiffusionNetwork
from megamask.engine.state.slices import StoredSlice

FP8_HISTORY, FP8_SCALE = "fp8.amax_history", "fp8.scale"
PRODUCTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The state of a product and its first row in the stored tensors."""

    scales: Scales
    first_row: int


class Fp8:
    """The FP8 products of one rank's layers; does nothing where precision.fp8 is none.

    Args:
        networks: this rank's stages.
        num_layers: of the complete network.
        group: tensor-parallel and data-parallel ranks that have shards or copies of the same layers.
    """

    def __init__(
        self,
        networks: Sequence[DiffusionNetwork],
        precision: PrecisionConfig,
        mesh: Mesh,
        *,
        num_layers: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._networks, self._precision = networks, precision
        self._num_layers, self._group, self._device = num_layers, group, device
        self._is_writer = mesh.tensor_parallel_rank == 0 and mesh.data_parallel_rank == 0
        self._is_emulated = precision.fp8 != "none" and precision.fp8_kernels == "emulate"
        self._quantizations: list[Quantization] = []
        self._places: list[_Place] = []
        if self._is_emulated:
            self._emulate()
        elif precision.fp8 == "delayed":
            from megamask.engine.layers.fp8_te import te_scales

            rows, modules = zip(*self._products(), strict=True)
            scales = te_scales(networks[0].config, list(modules))
            self._places = [_Place(scales=made, first_row=row) for row, made in zip(rows, scales, strict=True)]
        self._is_calibrated = not self._places

    def _products(self) -> Iterator[tuple[int, torch.nn.Module]]:
        """First row in the stored tensors and module of each quantised product of this stage."""
        last = self._num_layers - self._precision.fp8_last_layers_bf16
        for layer in itertools.chain.from_iterable(network.decoder.layers for network in self._networks):
            number = layer.layer_number - 1  # of the complete network
            if self._precision.fp8_first_layers_bf16 <= number < last:
                for product, name in enumerate(PRODUCTS):
                    yield (number * len(PRODUCTS) + product) * len(OPERANDS), layer.get_submodule(name)

    def _emulate(self) -> None:
        precision = self._precision
        for row, module in self._products():
            assert isinstance(module, Emulated)
            if precision.fp8 == "delayed":
                scales = DelayedScales(
                    history=precision.fp8_amax_history,
                    margin=precision.fp8_margin,
                    group=self._group,
                    device=self._device,
                )
                module.quantization = Delayed(scales)
                self._places.append(_Place(scales=scales, first_row=row))
            else:
                module.quantization = Tensorwise() if precision.fp8 == "tensorwise" else Blockwise()
            self._quantizations.append(module.quantization)

    @property
    def needs_calibration(self) -> bool:
        """True if delayed scaling has neither a history nor a loaded state: all its scales are 1."""
        return not self._is_calibrated

    def begin_step(self) -> None:
        """Note that the weights have changed."""
        for quantization in self._quantizations:
            quantization.begin_step()

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside, passes record magnitudes and quantise nothing; afterwards the scales fit the network.

        All of them together are one entry of the histories.
        """
        if self._is_emulated:
            with self._calibrating_emulation():
                yield
        else:
            from megamask.engine.layers.fp8_te import calibrating

            configs = [network.config for network in self._networks]
            with calibrating(configs, [module for _, module in self._products()]):
                yield
        for place in self._places:
            history, scale = place.scales.read()
            end_pass(history, scale, ALL, margin=self._precision.fp8_margin, group=self._group)
            place.scales.write(history, scale)
        self._is_calibrated = True
        self.begin_step()

    @contextlib.contextmanager
    def _calibrating_emulation(self) -> Iterator[None]:
        delayed = [each for each in self._quantizations if isinstance(each, Delayed)]
        for quantization in delayed:
            quantization.is_calibrating = True
        try:
            yield
        finally:
            for quantization in delayed:
                quantization.is_calibrating = False

    def kept(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a copy of the state, for `put_back`; empty where there is none yet."""
        return [place.scales.read() for place in self._places] if self._is_calibrated else []

    def put_back(self, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Return to a state; to none at all, so that the next step calibrates again, where there was none."""
        for place, state in zip(self._places, kept, strict=False):
            place.scales.write(*state)
        self._is_calibrated = bool(kept) or not self._places

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, forward-only passes leave the state as it is; Transformer Engine would record their magnitudes."""
        before = [] if self._is_emulated else [place.scales.read() for place in self._places]
        try:
            yield
        finally:
            for place, state in zip(self._places, before, strict=False):
                place.scales.write(*state)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the complete state has beside the weights' and Adam's."""
        if self._precision.fp8 != "delayed":
            return {}
        num_rows = self._num_layers * len(PRODUCTS) * len(OPERANDS)
        return {FP8_HISTORY: (num_rows, self._precision.fp8_amax_history), FP8_SCALE: (num_rows,)}

    def slices(self) -> list[StoredSlice]:
        """Return what this rank writes of the state: copies on the host."""
        return self._slices(torch.device("cpu")) if self._is_writer else []

    def targets(self, stored: Collection[str]) -> list[StoredSlice]:
        """Return what this rank reads of a state with these tensors; nothing where it has no scales."""
        return self._slices(self._device) if FP8_SCALE in stored else []

    def loaded(self, targets: list[StoredSlice]) -> None:
        """Take over what was read into `targets`; without it, the next step calibrates."""
        if targets:
            for place, history, scale in zip(self._places, targets[::2], targets[1::2], strict=True):
                place.scales.write(history.data, scale.data)
        self._is_calibrated = bool(targets) or not self._places
        self.begin_step()

    def _slices(self, device: torch.device) -> list[StoredSlice]:
        """History and scale of each product, one after the other."""
        shapes, slices = self.stored_shapes(), []
        for place in self._places:
            for name, data in zip((FP8_HISTORY, FP8_SCALE), place.scales.read(), strict=True):
                offsets = (place.first_row, 0)[: data.dim()]
                slices.append(StoredSlice(name=name, shape=shapes[name], offsets=offsets, data=data.to(device)))
        return slices
