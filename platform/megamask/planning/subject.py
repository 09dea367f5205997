"""The subject of a plan: a network, the objective's rows, a layout, and the settings that cost memory or time.

Ranks are numbered as the mesh numbers them: tensor parallel fastest, then context, data and pipeline parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.rules.layout import AxisSizes, stage_sizes
from megamask.models.spec import ModelSpec
from megamask.objectives.shapes import ObjectiveShape

BYTES_OF_FORMAT = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One training run, in numbers.

    Args:
        spec: the network.
        shape: what one sample becomes.
        axes: sizes of the mesh; they fit the network.
        global_batch_size, micro_batch_size: samples.
        compute: number format of weights and activations, "fp32" or "bf16".
        head_rows: rows of the head for a sample.
        head_chunk_rows: rows that the head computes at a time.
        has_fp8: whether the layers' matrix products are FP8.
        recompute: "none", "selective" (the attention's core and dense feed-forward parts) or "full" (every layer from
            its input).
        has_ring: whether context-parallel ranks hand keys and values round, instead of gathering them.
        is_overlapped: whether gradients and parameters travel while other layers compute.
        checkpoint_every_steps: None where only the last step commits.
    """

    spec: ModelSpec
    shape: ObjectiveShape
    axes: AxisSizes
    global_batch_size: int
    micro_batch_size: int
    compute: str
    head_rows: int
    head_chunk_rows: int
    has_fp8: bool = False
    recompute: str = "none"
    has_ring: bool = False
    is_overlapped: bool = False
    checkpoint_every_steps: int | None = None

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        axes = self.axes
        return (
            axes.tensor_parallel_size
            * axes.pipeline_parallel_size
            * axes.context_parallel_size
            * axes.data_parallel_size
        )

    @property
    def num_shares(self) -> int:
        """Data- and context-parallel ranks, which share the optimizer's state of dense parameters."""
        return self.axes.data_parallel_size * self.axes.context_parallel_size

    @property
    def ranks_of_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.num_shares * self.axes.tensor_parallel_size

    @property
    def format_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES_OF_FORMAT[self.compute]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a data-parallel rank in a step."""
        return self.global_batch_size // (self.axes.data_parallel_size * self.micro_batch_size)

    @property
    def rows(self) -> int:
        """Rows of the network in a micro-batch."""
        return self.micro_batch_size * self.shape.num_views

    @property
    def positions(self) -> int:
        """Positions of a micro-batch's rows on one context-parallel rank."""
        return self.rows * self.shape.input_length // self.axes.context_parallel_size

    @property
    def stored_positions(self) -> int:
        """Positions of the activations between matrices: sequence parallelism divides them once more."""
        axes = self.axes
        return self.positions // (axes.tensor_parallel_size if axes.sequence_parallel else 1)

    def stages_of(self, pipeline_rank: int) -> list[range]:
        """Global numbers of the layers of each model chunk that a pipeline rank holds, in the chunks' order."""
        axes = self.axes
        sizes = stage_sizes(self.spec.num_layers, axes.num_stages, axes.pipeline_split)
        if sizes is None:
            raise ValueError("the layers cannot be cut into these stages")
        starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
        return [
            range(starts[stage], starts[stage] + sizes[stage])
            for stage in range(pipeline_rank, axes.num_stages, axes.pipeline_parallel_size)
        ]

    def is_first(self, pipeline_rank: int, chunk: int) -> bool:
        """Return True if a rank's chunk holds the embedding."""
        return pipeline_rank == 0 and chunk == 0

    def is_last(self, pipeline_rank: int, chunk: int) -> bool:
        """Return True if a rank's chunk holds the final norm and the head."""
        axes = self.axes
        return pipeline_rank == axes.pipeline_parallel_size - 1 and chunk == axes.virtual_pipeline_parallel_size - 1
