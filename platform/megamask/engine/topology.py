"""Where each rank stands: integer arithmetic, no process group needed.

Ranks are numbered as megatron-core numbers them: tensor parallel fastest, then data parallel, then pipeline parallel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megamask.config.schema.layout import LayoutConfig
from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One rank's coordinates on the mesh.

    Args:
        rank: global rank, 0 <= rank < world_size.
        tensor_parallel_size, data_parallel_size, pipeline_parallel_size: ranks on each axis.
        sequence_parallel: whether activations between matrices are sharded over the tensor-parallel ranks.
    """

    rank: int
    tensor_parallel_size: int
    data_parallel_size: int
    pipeline_parallel_size: int
    sequence_parallel: bool = False

    @classmethod
    def from_layout(cls, layout: LayoutConfig, *, rank: int, world_size: int) -> Topology:
        """Places a rank.

        Raises:
            UsageError: the layout's sizes do not multiply to the number of processes.
        """
        topology = cls(
            rank=rank,
            tensor_parallel_size=layout.tensor_parallel_size,
            data_parallel_size=layout.data_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            # with one tensor-parallel rank there is nothing to shard; megatron-core refuses the flag
            sequence_parallel=layout.sequence_parallel and layout.tensor_parallel_size > 1,
        )
        if topology.world_size != world_size:
            raise UsageError(
                f"layout asks for {layout.tensor_parallel_size} tensor-parallel x {layout.data_parallel_size} "
                f"data-parallel x {layout.pipeline_parallel_size} pipeline-parallel = {topology.world_size} processes, "
                f"but {world_size} were started. Nothing was trained.",
                hint="change layout.data_parallel_size, or start that many processes",
            )
        return topology

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.tensor_parallel_size * self.data_parallel_size * self.pipeline_parallel_size

    @property
    def tensor_parallel_rank(self) -> int:
        """Place on the tensor-parallel axis."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Place on the data-parallel axis."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_parallel_rank(self) -> int:
        """Place on the pipeline-parallel axis; 0 holds the embedding."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its data-parallel coordinate in global sums: exactly one rank each does."""
        return self.tensor_parallel_rank == 0 and self.is_last_stage

    def layers(self, num_layers: int) -> range:
        """Global numbers of the layers that this pipeline stage holds; num_layers divides by the stages."""
        share = num_layers // self.pipeline_parallel_size
        return range(self.pipeline_parallel_rank * share, (self.pipeline_parallel_rank + 1) * share)

    def members(self, global_batch_size: int, micro_batch_size: int) -> list[int]:
        """Places j of the global batch that this rank computes, in the order of its micro-batches."""
        return list(self._members(global_batch_size, micro_batch_size))

    def _members(self, global_batch_size: int, micro_batch_size: int) -> Iterator[int]:
        for first in range(
            self.data_parallel_rank * micro_batch_size, global_batch_size, self.data_parallel_size * micro_batch_size
        ):
            yield from range(first, first + micro_batch_size)
