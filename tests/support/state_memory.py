"""Work of each process of a memory test: it saves and loads a state and reports how far its memory rose meanwhile."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamask.models.experts import ExpertSpec
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from support import engine_cases as cases

SPEC = dataclasses.replace(
    cases.PLAIN,
    num_layers=4,
    hidden_size=192,
    ffn_hidden_size=768,
    head_dim=48,
    vocab_size=4000,
    padded_vocab_size=4096,
)


EXPERTS = dataclasses.replace(SPEC, experts=ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=192, num_shared=1))


def run(root: str, runs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """For each layout: read the state that the one before wrote, write it again, with and without a copy."""
    folders = [str(Path(root) / str(number)) for number in range(len(runs))]
    return [
        measure(SPEC, layout, source=source, target=target)
        for layout, source, target in zip(runs, [None, *folders], folders, strict=False)
    ]


def of_experts(layout: dict[str, Any], source: str | None, target: str) -> dict[str, int]:
    """`measure` of the network with experts."""
    return measure(EXPERTS, layout, source=source, target=target)


def measure(spec: ModelSpec, layout: dict[str, Any], *, source: str | None, target: str) -> dict[str, int]:
    """Bytes that a rank has of the state, that its largest tensor has, and by which memory rises to load and to save.

    Args:
        source: folder of the state that is read, if one is.
        target: folder that it is written to.
    """
    engine = cases.make_engine(spec, layout, micro_batch_size=1)
    cases.take_step(engine, 1)
    answer = {"largest": 4 * max(math.prod(shape) for shape in canonical_shapes(spec).values())}
    if source is not None:
        answer["load"] = _rise(lambda: engine.load_state(Path(source)))
    if engine.is_main:
        Path(target).mkdir()
    engine.barrier()
    answer["save"] = _rise(lambda: cases.save_state(engine, Path(target)))
    answer["copy"] = _rise(lambda: engine.state_share(copy=True))
    shards = engine._optimizer.shards()
    answer["share"] = sum(3 * 4 * shard.weight.numel() for shard in shards if shard.info.is_stored)
    engine.close()
    return answer


def _rise(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates: Python's at the peak, with every buffer that is read into, and all tensors'."""
    if not tracemalloc.is_tracing():  # and never stop: threads of the process group may allocate just then, and crash
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with _NewTensors() as tensors:
        call()
    in_python = tracemalloc.get_traced_memory()[1] - before
    return in_python + tensors.num_bytes


class _NewTensors(TorchDispatchMode):
    """Adds up the memory of every tensor that an operation makes; views of what it was given are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        answer = func(*args, **(kwargs or {}))
        for tensor in _tensors(answer):
            if tensor.untyped_storage().data_ptr() not in given:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return answer


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
