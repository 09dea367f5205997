"""CUDA graphs of the layers' feed-forward parts: their kernels are launched together, as one graph each way.

Capture and replay are megatron-core's and Transformer Engine's. Attention stays outside, because positions, documents
and patterns differ from row to row and a graph takes tensors of one shape only. No device has run this yet.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel

OPTIONS: dict[str, Any] = {
    "cuda_graph_impl": "transformer_engine",
    "cuda_graph_scope": ["mlp"],
    "cuda_graph_warmup_steps": 0,
}
"""Settings of megatron-core's config for layers that have graphs."""


class FeedForwardGraphs:
    """Graphs of one rank's stages, captured when they are made; none where device.cuda_graphs is false.

    Args:
        chunks: this rank's stages; what capturing adds to their gradient buffers is cleared again.
        shape: (r, i), rows of a micro-batch and positions of a row: every training pass has it.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], shape: tuple[int, int], *, is_on: bool) -> None:
        self._layers: list[Any] = []
        if not is_on:
            return
        library = importlib.import_module("megatron.core.transformer.cuda_graphs")
        # of megatron-core's own training loop; without pipeline stages one graph serves all micro-batches
        setattr(library, "get_num_microbatches", lambda: 1)  # noqa: B010
        helper = library.TECudaGraphHelper(list(chunks), chunks[0].config, shape[1], shape[0])
        helper.create_cudagraphs()
        self._layers = helper.flattened_callables

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, layers compute without graphs: passes that only look may have other shapes."""
        graphs = [layer.cuda_graphs for layer in self._layers]
        for layer in self._layers:
            layer.cuda_graphs = []
        try:
            yield
        finally:
            for layer, found in zip(self._layers, graphs, strict=True):
                layer.cuda_graphs = found
