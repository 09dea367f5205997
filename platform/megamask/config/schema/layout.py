"""Layout of a run over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.batch import batch_layout_problems
from megamask.config.rules.experts import expert_layout_problems
from megamask.config.rules.layout import PIPELINE_SPLITS, AxisSizes, Shared, layout_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import operational
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(Section):
    """Sizes of the mesh axes; their product is the number of processes."""

    tensor_parallel_size: int = operational(
        "ranks that share each layer's matrices", default=1, minimum=1, unit="ranks"
    )
    pipeline_parallel_size: int = operational("ranks that share the layers", default=1, minimum=1, unit="ranks")
    virtual_pipeline_parallel_size: int = operational(
        "pieces of the network on each pipeline rank; more of them shorten the time in which ranks wait for each other",
        default=1,
        minimum=1,
        unit="pieces",
    )
    pipeline_split: str = operational(
        "how the layers are cut into pipeline stages: layers (equal numbers), or balanced (embedding and head count as "
        "a layer each, and any number of layers can be cut)",
        default="layers",
        choices=PIPELINE_SPLITS,
    )
    context_parallel_size: int = operational(
        "ranks that share each row; keys and values travel between them", default=1, minimum=1, unit="ranks"
    )
    expert_parallel_size: int = operational(
        "ranks that share the experts of a layer; they lie on the tensor, context and data axes and add no processes",
        default=1,
        minimum=1,
        unit="ranks",
    )
    expert_tensor_parallel_size: int = operational(
        "ranks that share each expert's matrices", default=1, minimum=1, unit="ranks"
    )
    data_parallel_size: int = operational("ranks that share the batch", default=1, minimum=1, unit="ranks")
    sequence_parallel: bool = operational(
        "activations between matrices are sharded over the tensor-parallel ranks", default=False
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Axes that do not divide the model, the row or the batch."""
        yield from layout_problems(shared_numbers(config), self.axis_sizes)
        model = config.model
        yield from expert_layout_problems(
            self.axis_sizes,
            num_experts=model.num_experts,
            ffn_hidden_size=model.expert_ffn_hidden_size or 0,
            layers=config.device.layers,
            num_layers=model.num_layers,
            num_dense_layers=model.num_dense_layers,
        )
        yield from batch_layout_problems(
            config.training.batch_levels(),
            data_parallel_size=self.data_parallel_size,
            micro_batch_size=config.training.micro_batch_size,
            # an interleaved schedule runs micro-batches in groups, one for each pipeline rank
            group_size=self.pipeline_parallel_size if self.virtual_pipeline_parallel_size > 1 else 1,
        )

    @property
    def axis_sizes(self) -> AxisSizes:
        """The sizes as the rules take them."""
        return AxisSizes(
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            virtual_pipeline_parallel_size=self.virtual_pipeline_parallel_size,
            context_parallel_size=self.context_parallel_size,
            data_parallel_size=self.data_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            sequence_parallel=self.sequence_parallel,
            pipeline_split=self.pipeline_split,
        )

    @property
    def num_processes(self) -> int:
        """Processes of the job."""
        return (
            self.tensor_parallel_size
            * self.pipeline_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )


def shared_numbers(config: TrainConfig) -> Shared:
    """The numbers of a config that its layout divides."""
    model = config.model
    return Shared(
        num_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.effective_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_padding_multiple=model.vocab_padding_multiple,
        sequence_length=config.training.sequence_length,
    )


def nearest_replicas(config: TrainConfig, num_processes: int) -> str | None:
    """The largest data-parallel size that the batch allows on that many processes, as a phrase; None if not even one.

    The other axes stay as they are.
    """
    layout, training = config.layout, config.training
    others = layout.num_processes // layout.data_parallel_size
    sizes = [
        size
        for size in range(1, num_processes // others + 1)
        if training.global_batch_size % (size * training.micro_batch_size) == 0
    ]
    return f"layout.data_parallel_size={sizes[-1]} uses {sizes[-1] * others}" if sizes else None
