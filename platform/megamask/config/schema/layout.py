"""Layout of a run over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.batch import batch_layout_problems
from megamask.config.rules.layout import Shared, layout_problems
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
    data_parallel_size: int = operational("ranks that share the batch", default=1, minimum=1, unit="ranks")
    sequence_parallel: bool = operational(
        "activations between matrices are sharded over the tensor-parallel ranks", default=False
    )

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Axes that do not divide the model, the row or the batch."""
        yield from layout_problems(
            shared_numbers(config),
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            sequence_parallel=self.sequence_parallel,
        )
        yield from batch_layout_problems(
            config.training.batch_levels(),
            data_parallel_size=self.data_parallel_size,
            micro_batch_size=config.training.micro_batch_size,
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
