"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import operational


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Sizes of the mesh axes; their product is the number of processes."""

    tensor_parallel_size: int = operational(
        "ranks that share each layer's matrices", default=1, minimum=1, unit="ranks"
    )
    pipeline_parallel_size: int = operational("ranks that share the layers", default=1, minimum=1, unit="ranks")
    data_parallel_size: int = operational("ranks that share the batch", default=1, minimum=1, unit="ranks")
    sequence_parallel: bool = operational(
        "activations between matrices are sharded over the tensor-parallel ranks", default=False
    )
