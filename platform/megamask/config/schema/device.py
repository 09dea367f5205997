"""Arithmetic of the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Choices that concern the machine, not the result that is sought."""

    layers: str = operational(
        "modules of the layers: local are megatron-core's and run on any device, te are Transformer Engine's and need "
        "a GPU; auto takes te where they can run. Checkpoints load into both",
        default="auto",
        choices=("auto", "te", "local"),
    )
    attention: str = operational(
        "kernels of attention: sdpa are torch's, te are Transformer Engine's and need its layers and rows whose "
        "positions see one another completely or causally inside a document. Under context parallelism sdpa gathers "
        "keys and values, te hands them round in a ring; auto is sdpa",
        default="auto",
        choices=("auto", "sdpa", "te"),
    )
    experts: str = operational(
        "matrix products of a rank's experts: sequential are one after another, grouped are one call of Transformer "
        "Engine for all experts of a layer and need a GPU; auto is sequential. Checkpoints load into both",
        default="auto",
        choices=("auto", "sequential", "grouped"),
    )
    kernels: str = operational(
        "rotary positions, SwiGLU and noise: compiled makes one kernel of each by torch.compile and needs a GPU, "
        "Triton and a C compiler; auto is compiled where those are found, otherwise plain",
        default="auto",
        choices=("auto", "compiled", "plain"),
    )
    grouped_queries: str = operational(
        "keys and values of grouped-query attention: shared reads one copy for the queries of a group where every "
        "position sees every other, repeated copies them for each head; auto is shared on a GPU, repeated on a CPU",
        default="auto",
        choices=("auto", "shared", "repeated"),
    )
    weight_gradients: str = operational(
        "weight gradients of Transformer Engine's linear layers: fused adds them to the float32 buffers within the "
        "matrix product, separate rounds each micro-batch's to precision.compute first; auto is fused. Other layers "
        "have separate ones",
        default="auto",
        choices=("auto", "fused", "separate"),
    )
    overlap_gradient_reduce: bool = operational(
        "sum gradients over data- and context-parallel ranks while the backward pass of the last micro-batch goes on, "
        "in parts",
        default=False,
    )
    overlap_parameter_gather: bool = operational(
        "gather the updated weights of each part while the next step's forward pass computes with the parts before it; "
        "needs device.overlap_gradient_reduce, which makes the parts",
        default=False,
    )
    cuda_graphs: bool = operational(
        "launch the kernels of each layer's feed-forward part together, as one CUDA graph each way; for Transformer "
        "Engine's layers in bf16 on data-parallel ranks. No device has run it yet",
        default=False,
    )
    deterministic: bool = operational(
        "the same layout on the same GPU type repeats a run bit for bit; false lets the libraries choose faster "
        "kernels whose sums have no fixed order. On a CPU every run repeats itself, for either value",
        default=True,
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Layers and attention that contradict the number format or the objective."""
        precision, layout = config.precision, config.layout
        if precision.fp8 != "none":
            is_emulated = precision.fp8_kernels == "emulate"
            if self.layers == ("te" if is_emulated else "local"):
                yield Problem(
                    key="device.layers",
                    because=f"but precision.fp8_kernels is {precision.fp8_kernels}, which has other layers",
                    allowed="auto, local" if is_emulated else "auto, te",
                )
        if self.overlap_gradient_reduce and layout.data_parallel_size * layout.context_parallel_size == 1:
            yield Problem(
                key="device.overlap_gradient_reduce",
                because="but layout.data_parallel_size and layout.context_parallel_size are 1, so that there is "
                "nothing to sum",
                allowed="false, or one of them above 1",
            )
        if self.overlap_gradient_reduce and config.layout.virtual_pipeline_parallel_size > 1:
            yield Problem(
                key="device.overlap_gradient_reduce",
                because="but layout.virtual_pipeline_parallel_size is above 1, whose schedule sums at its own times",
                allowed="false",
            )
        if self.overlap_parameter_gather and not self.overlap_gradient_reduce:
            yield Problem(
                key="device.overlap_parameter_gather",
                because="but device.overlap_gradient_reduce is false, so that all weights are one part",
                allowed="false; or both true",
            )
        if self.grouped_queries != "auto" and config.model.effective_query_groups == config.model.num_attention_heads:
            yield Problem(
                key="device.grouped_queries",
                because="but each query head has keys and values of its own (model.num_query_groups)",
                allowed="auto",
            )
        if self.cuda_graphs:
            yield from _graph_problems(self, config)
        if self.weight_gradients != "auto" and (self.layers == "local" or precision.fp8_kernels == "emulate"):
            yield Problem(
                key="device.weight_gradients",
                because="but the layers are not Transformer Engine's, the only ones that have a choice",
                allowed="auto; or another value with device.layers=te",
            )
        if self.experts == "grouped" and config.model.num_experts == 0:
            yield Problem(
                key="device.experts",
                because="but model.num_experts is 0, a dense network",
                allowed="auto, sequential",
            )
        if self.attention == "te":
            yield from self._problems_of_te_attention(config)

    def _problems_of_te_attention(self, config: TrainConfig) -> Iterator[Problem]:
        """Layers that do not have it, and rows that its kernels do not take."""
        reason, more = None, ""
        if self.layers == "local":
            reason, more = "device.layers is local", "; or te with device.layers=te"
        elif config.objective.name == "block":
            reason = "objective.name is block, whose rows need a mask that only sdpa takes"
        elif config.initialise.attention_annealing_steps > 0:
            reason = "initialise.attention_annealing_steps is above 0: such rows need a mask that only sdpa takes"
        elif config.layout.context_parallel_size > 1:
            # its ring cuts each document in pieces, context-parallel ranks here have the same pieces of every row
            parts = "layout.context_parallel_size is above 1, and its ring takes undivided rows only"
            if config.data.isolate_documents:
                reason, more = f"{parts}: data.isolate_documents is true", "; or data.isolate_documents=false"
            elif config.objective.random_length_fraction > 0:
                reason = f"{parts}: objective.random_length_fraction is above 0"
        if reason is not None:
            yield Problem(key="device.attention", because=f"but {reason}", allowed=f"auto, sdpa{more}")


def _graph_problems(device: DeviceConfig, config: TrainConfig) -> Iterator[Problem]:
    """Settings under which a captured graph would compute something else, or was never tried."""
    layout, objective = config.layout, config.objective
    shared = ("tensor", "pipeline", "context")
    sizes = {f"layout.{axis}_parallel_size": getattr(layout, f"{axis}_parallel_size") for axis in shared}
    reasons = {
        "device.layers": device.layers == "local" or config.precision.fp8_kernels == "emulate",
        "precision.compute": config.precision.compute != "bf16",
        "precision.fp8": config.precision.fp8 == "delayed",
        "training.recompute": config.training.recompute != "none",
        "model.num_experts": config.model.num_experts > 0,
        "device.overlap_gradient_reduce": device.overlap_gradient_reduce,
        # the number of documents, which Transformer Engine's attention takes, is data
        "data.isolate_documents": config.data.isolate_documents and device.attention == "te",
        "objective.random_length_fraction": objective.random_length_fraction > 0 and device.attention == "te",
        "objective.block_schedule": bool(objective.block_schedule),
        "objective.complementary_until_tokens": objective.complementary_until_tokens is not None,
        **{name: size > 1 for name, size in sizes.items()},
    }
    for name, is_in_the_way in reasons.items():
        if is_in_the_way:
            yield Problem(
                key="device.cuda_graphs",
                because=f"which {name} rules out: graphs are of Transformer Engine's layers in bf16, without delayed "
                "scaling, on data-parallel ranks alone, and of one shape",
                allowed=f"false; or another {name}",
            )
