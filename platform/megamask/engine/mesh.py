"""The mesh of ranks: axes, sizes, coordinates and process groups. Nothing else asks megatron-core about them.

Coordinates are integer arithmetic and need no process group. Ranks are numbered as megatron-core numbers them: tensor
parallel fastest, then context, data and pipeline parallel.

The layers are cut into stages, pipeline_parallel_size * virtual_pipeline_size of them, in the network's order. A
pipeline rank p holds the stages p, p + pipeline_parallel_size, ...: its chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamask.config.rules.layout import stage_sizes
from megamask.config.schema.layout import LayoutConfig
from megamask.engine.process_group import collective_timeout_s
from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the axes and one rank's coordinates.

    Args:
        rank: global rank, 0 <= rank < world_size.
        tensor_parallel_size, context_parallel_size, data_parallel_size, pipeline_parallel_size: ranks on each axis.
        expert_parallel_size, expert_tensor_parallel_size: ranks that share the experts of a layer, and each expert's
            matrices; they lie on the tensor, context and data axes together.
        virtual_pipeline_size: pieces of the network on each pipeline rank.
        pipeline_split: how the layers are cut into stages (config/rules/layout.py).
        sequence_parallel: whether activations between matrices are sharded over the tensor-parallel ranks.
    """

    rank: int
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    virtual_pipeline_size: int = 1
    pipeline_split: str = "layers"
    sequence_parallel: bool = False

    @classmethod
    def from_layout(cls, layout: LayoutConfig, *, rank: int, world_size: int) -> Mesh:
        """Place a rank.

        Raises:
            UsageError: the layout's sizes do not multiply to the number of processes.
        """
        mesh = cls(
            rank=rank,
            tensor_parallel_size=layout.tensor_parallel_size,
            context_parallel_size=layout.context_parallel_size,
            data_parallel_size=layout.data_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            virtual_pipeline_size=layout.virtual_pipeline_parallel_size,
            expert_parallel_size=layout.expert_parallel_size,
            expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
            pipeline_split=layout.pipeline_split,
            # with one tensor-parallel rank there is nothing to shard; megatron-core refuses the flag
            sequence_parallel=layout.sequence_parallel and layout.tensor_parallel_size > 1,
        )
        if mesh.world_size != world_size:
            raise UsageError(
                f"layout asks for {layout.tensor_parallel_size} tensor-parallel x {layout.context_parallel_size} "
                f"context-parallel x {layout.data_parallel_size} data-parallel x {layout.pipeline_parallel_size} "
                f"pipeline-parallel = {mesh.world_size} processes, "
                f"but {world_size} were started. Nothing was trained.",
                hint="change layout.data_parallel_size, or start that many processes",
            )
        return mesh

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return (
            self.tensor_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
            * self.pipeline_parallel_size
        )

    @property
    def tensor_parallel_rank(self) -> int:
        """Coordinate on the tensor-parallel axis."""
        return self.rank % self.tensor_parallel_size

    @property
    def context_parallel_rank(self) -> int:
        """Coordinate on the context-parallel axis; its ranks compute parts of the same rows."""
        return self.rank // self.tensor_parallel_size % self.context_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Coordinate on the data-parallel axis."""
        return self.rank // (self.tensor_parallel_size * self.context_parallel_size) % self.data_parallel_size

    @property
    def pipeline_parallel_rank(self) -> int:
        """Coordinate on the pipeline-parallel axis; 0 holds the embedding."""
        return self.rank // (self.tensor_parallel_size * self.context_parallel_size * self.data_parallel_size)

    @property
    def expert_tensor_parallel_rank(self) -> int:
        """Coordinate among the ranks that share an expert's matrices."""
        return self.rank % self.expert_tensor_parallel_size

    @property
    def expert_parallel_rank(self) -> int:
        """Coordinate among the ranks that share the experts of a layer."""
        return self.rank // self.expert_tensor_parallel_size % self.expert_parallel_size

    def experts(self, num_experts: int) -> range:
        """Global numbers of the experts that this rank holds in each layer; num_experts divides by the ranks."""
        share = num_experts // self.expert_parallel_size
        return range(self.expert_parallel_rank * share, (self.expert_parallel_rank + 1) * share)

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the output layer."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def is_metrics_rank(self) -> bool:
        """True if this rank adds what it scored to global sums: one rank for each part of the rows."""
        return self.tensor_parallel_rank == 0 and self.is_last_stage

    @property
    def is_counting_rank(self) -> bool:
        """True if this rank adds its rows' counts to global sums: one rank for each set of complete rows."""
        return self.is_metrics_rank and self.context_parallel_rank == 0

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are cut into."""
        return self.pipeline_parallel_size * self.virtual_pipeline_size

    def stage(self, chunk: int) -> int:
        """Place of one of this rank's chunks (from 0) in the network's order of stages."""
        return chunk * self.pipeline_parallel_size + self.pipeline_parallel_rank

    def stage_layers(self, num_layers: int) -> list[range]:
        """Global numbers of the layers of every stage, in the network's order.

        Raises:
            ValueError: the layers cannot be cut into that many stages in that way.
        """
        sizes = stage_sizes(num_layers, self.num_stages, self.pipeline_split)
        if sizes is None:
            raise ValueError(f"{num_layers} layers cannot be cut into {self.num_stages} stages ({self.pipeline_split})")
        ends = list(itertools.accumulate(sizes))
        return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def layers(self, num_layers: int, chunk: int = 0) -> range:
        """Global numbers of the layers that one of this rank's chunks holds."""
        return self.stage_layers(num_layers)[self.stage(chunk)]

    def members(self, global_batch_size: int, micro_batch_size: int) -> list[int]:
        """Positions in the global batch that this rank computes, in the order of its micro-batches."""
        return list(self._members(global_batch_size, micro_batch_size))

    def _members(self, global_batch_size: int, micro_batch_size: int) -> Iterator[int]:
        for first in range(
            self.data_parallel_rank * micro_batch_size, global_batch_size, self.data_parallel_size * micro_batch_size
        ):
            yield from range(first, first + micro_batch_size)


class ProcessGroups:
    """The process groups of a mesh: those of megatron-core, made once for a layout.

    Another engine of the same layout uses the same groups, because making them takes a while.

    Raises:
        RuntimeError: megatron-core numbers the ranks in another way, or its groups are of another layout.
    """

    def __init__(self, mesh: Mesh) -> None:
        from megatron.core import parallel_state, tensor_parallel

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=mesh.tensor_parallel_size,
                pipeline_model_parallel_size=mesh.pipeline_parallel_size,
                virtual_pipeline_model_parallel_size=(
                    mesh.virtual_pipeline_size if mesh.virtual_pipeline_size > 1 else None
                ),
                context_parallel_size=mesh.context_parallel_size,
                expert_model_parallel_size=mesh.expert_parallel_size,
                expert_tensor_parallel_size=mesh.expert_tensor_parallel_size,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=collective_timeout_s() / 60,  # else each group has 30 minutes of its own
            )
        actual = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
        expected = (
            mesh.tensor_parallel_rank,
            mesh.context_parallel_rank,
            mesh.data_parallel_rank,
            mesh.pipeline_parallel_rank,
            mesh.tensor_parallel_size,
            mesh.context_parallel_size,
            mesh.pipeline_parallel_size,
            mesh.virtual_pipeline_size,
            mesh.expert_parallel_rank,
            mesh.expert_tensor_parallel_rank,
            mesh.expert_parallel_size,
            mesh.expert_tensor_parallel_size,
        )
        if actual != expected:
            raise RuntimeError(f"megatron-core places rank {mesh.rank} at {actual}, the mesh at {expected}")
        # sequence parallelism forks a generator of this name; nothing draws from it, dropout is 0
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self._mesh = mesh
        self.tensor: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self.tensor_and_context: dist.ProcessGroup = parallel_state.get_tensor_and_context_parallel_group()
        self.context: dist.ProcessGroup = parallel_state.get_context_parallel_group()
        # ranks with shards or copies of the same layers
        self.replicas: dist.ProcessGroup = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._pipeline: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
        self._last_stage: int = parallel_state.get_pipeline_model_parallel_last_rank()

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> None:
        """Replace the tensor on every pipeline stage by the last stage's; collective over the stages."""
        if self._mesh.pipeline_parallel_size > 1:
            dist.broadcast(tensor, src=self._last_stage, group=self._pipeline)

    def sum_over_context(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that hold parts of the same rows; collective over them."""
        if self._mesh.context_parallel_size > 1:
            dist.all_reduce(tensor, group=self.context)
        return tensor

    def gather_over_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack the tensors of the tensor-parallel ranks, [tp, ...]; collective over them."""
        parts = tensor.new_empty(self._mesh.tensor_parallel_size, *tensor.shape)
        dist.all_gather(list(parts), tensor, group=self.tensor)
        return parts

    @staticmethod
    def release() -> None:
        """Forget the groups, so that an engine of another layout can be made; the process group stays."""
        from megatron.core import parallel_state

        # megatron-core only forgets its groups; those of gloo have three threads each, which wake many times a second
        made = [group for group in _groups() if group is not dist.group.WORLD]
        parallel_state.destroy_model_parallel()
        for group in made:
            dist.destroy_process_group(group)


def _groups() -> list[dist.ProcessGroup]:
    """Every group of this process; torch names no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)
