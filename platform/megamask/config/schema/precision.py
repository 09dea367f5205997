"""Number formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from megamask.config.rules.precision import Products, product_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Section):
    """The number formats of activations, gradients and the layers' matrix products."""

    compute: str = identity(
        "number format of weights and activations; with bf16 Adam updates float32 master weights, gradients are summed "
        "and the loss is computed in float32, and checkpoints hold the masters",
        default="fp32",
        choices=("fp32", "bf16"),
    )
    fp8: str = identity(
        "recipe that quantises the matrix products of the layers to FP8; embedding, attention, norms and output layer "
        "keep precision.compute",
        default="none",
        choices=("none", "tensorwise", "delayed", "blockwise", "mxfp8"),
    )
    fp8_kernels: str = identity(
        "te are Transformer Engine's FP8 kernels; emulate rounds as they do and multiplies in float32, on any device "
        "and slower than no FP8",
        default="te",
        choices=("te", "emulate"),
    )
    fp8_first_layers_bf16: int = identity(
        "layers at the input that keep precision.compute", default=0, minimum=0, unit="layers"
    )
    fp8_last_layers_bf16: int = identity(
        "layers at the output that keep precision.compute", default=0, minimum=0, unit="layers"
    )
    fp8_amax_history: int = identity(
        "forward passes whose largest magnitudes set a scale of fp8=delayed; a step has one for each micro-batch",
        default=1024,
        minimum=1,
        unit="passes",
    )
    fp8_margin: int = identity("powers of two that fp8=delayed keeps free above the largest magnitude", default=0)

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Keys without an effect, and shapes or settings that a recipe does not take."""
        yield from self._idle_keys()
        if self.fp8 == "none":
            return
        if self.fp8_kernels == "emulate" and self.fp8 == "mxfp8":
            yield Problem(
                key="precision.fp8",
                because="which megamask does not emulate",
                allowed="tensorwise, delayed, blockwise; or precision.fp8_kernels=te on a GPU that has the format",
            )
        if self.fp8_kernels == "te" and self.compute != "bf16":
            yield Problem(
                key="precision.compute",
                because="but Transformer Engine's FP8 layers work on bf16 activations",
                allowed="bf16; or precision.fp8_kernels=emulate",
            )
        if config.model.num_experts > 0:
            yield Problem(
                key="precision.fp8",
                because=f"but model.num_experts is {config.model.num_experts}, and products of experts have no FP8 yet",
                allowed="none",
            )
        in_compute, num_layers = self.fp8_first_layers_bf16 + self.fp8_last_layers_bf16, config.model.num_layers
        if in_compute >= num_layers:
            yield Problem(
                key="precision.fp8_first_layers_bf16"
                if self.fp8_first_layers_bf16
                else "precision.fp8_last_layers_bf16",
                because=f"but the model has {num_layers} layers, so that none of them would compute in FP8",
                allowed=f"together with the other end at most {num_layers - 1}; or precision.fp8=none",
            )
        if self.fp8 == "delayed" and config.training.recompute != "none":
            yield Problem(
                key="training.recompute",
                because="but precision.fp8=delayed counts forward passes, and a recomputed one would count twice",
                allowed="none; or another precision.fp8",
            )
        if self.fp8_kernels == "te":
            yield from product_problems(self.fp8, Products.of(config))

    def _idle_keys(self) -> Iterator[Problem]:
        defaults = {field.name: field.default for field in fields(self)}
        unused = {
            "fp8_kernels": self.fp8 == "none",
            "fp8_first_layers_bf16": self.fp8 in ("none", "delayed"),
            "fp8_last_layers_bf16": self.fp8 in ("none", "delayed"),
            "fp8_amax_history": self.fp8 != "delayed",
            "fp8_margin": self.fp8 != "delayed",
        }
        for name, is_idle in unused.items():
            if is_idle and getattr(self, name) != defaults[name]:
                yield Problem(
                    key=f"precision.{name}",
                    because=f"but precision.fp8 is {self.fp8}, which does not use it",
                    allowed=f"{defaults[name]}, its default; or another precision.fp8",
                )
