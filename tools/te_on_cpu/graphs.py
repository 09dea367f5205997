"""CUDA graphs on CPU tensors: a capture remembers torch's operations, a replay repeats them on the same tensors.

As on a device, Python between the operations runs at the capture alone, inputs and outputs keep their memory, and what
changes from replay to replay is in the tensors. Memory is not shared between graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REPLAYS = [0]
"""Replays of all graphs so far."""


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self, *unused: Any) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """Repeat every operation; results go to the memory that those of the capture have."""
        REPLAYS[0] += 1
        with torch.no_grad():
            for function, arguments, options, results in self.calls:
                again = function(*arguments, **options)
                for kept, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)

    def register_generator_state(self, state: Any) -> None:
        """Nothing: no operation draws."""

    def reset(self) -> None:
        """Forget the operations."""
        self.calls.clear()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._calls = graph.calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self._calls.append(tree_map(_kept, (function, args, kwargs or {}, results)))
        return results


def _kept(value: Any) -> Any:
    """Another tensor on the same memory: the library empties tensors that it no longer needs."""
    return value.detach() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def capture(graph: RecordedGraph, *unused: Any, **options: Any) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    with _Recorder(graph):
        yield


def install() -> None:
    """Substitute torch's graphs and the library's handles of their memory."""
    torch.cuda.CUDAGraph = RecordedGraph
    torch.cuda.graph = capture
    from transformer_engine.pytorch import graph as library

    library.graph_pool_handle = lambda: (0, 0)
    library.make_weak_ref = lambda tensors: tensors
