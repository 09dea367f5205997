"""Gradients of one long bf16 step under a layout, by canonical name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support import engine_cases as cases

SEQUENCE_LENGTH = 1024
MICRO_BATCH_SIZE = 4  # of pairs: 8,192 positions, about half of them the mask token
OVERLAP = "overlap_gradient_reduce"  # among the sizes of a layout
_WIDE = {"hidden_size": 64, "ffn_hidden_size": 128, "head_dim": 16, "max_sequence_length": SEQUENCE_LENGTH}
_WORDS = {"vocab_size": 509, "padded_vocab_size": 512}
SPECS = {
    "plain": dataclasses.replace(cases.PLAIN, **_WIDE, **_WORDS),
    "tied": dataclasses.replace(cases.OPTIONS, **_WIDE, **_WORDS),
}


def lengthen() -> None:
    """Makes the cases' rows long, in this process."""
    cases.SEQUENCE_LENGTH = SEQUENCE_LENGTH


def run_layouts(root: str, runs: list[list[Any]]) -> list[None]:
    """Each run: name of a spec and a layout; the first rank writes the gradients to a file of the run's number."""
    lengthen()
    for number, (spec, named) in enumerate(runs):
        layout = dict(named)
        overlap = layout.pop(OVERLAP, False)
        engine = cases.make_engine(
            SPECS[spec],
            layout,
            micro_batch_size=MICRO_BATCH_SIZE,
            compute="bf16",
            clip_grad_norm=0.0,
            overlap=overlap,
        )
        cases.take_step(engine, 1, learning_rate=0.0)
        gradients = _global_gradients(engine)
        if engine.is_main:
            torch.save(gradients, Path(root) / f"{dist.get_world_size()}-{number}.pt")
        engine.close()
    return []


def _global_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Each rank adds the part that it updates: the buffers of other parts hold its own share of the sum only."""
    from megamask.models.shapes import canonical_shapes

    tensors = {name: torch.zeros(shape) for name, shape in canonical_shapes(engine._spec).items()}
    parameters = dict(engine._rank_model.network.named_parameters())
    for shard in engine._optimizer.shards():
        if not shard.info.is_stored:
            continue
        whole = parameters[shard.info.name].main_grad
        own = torch.zeros_like(whole)
        own.view(-1)[shard.start : shard.stop] = whole.reshape(-1)[shard.start : shard.stop]
        for block in shard.info.canonical:
            tensors[block.name][block.index] += own[block.first_row : block.first_row + block.sizes[0]]
    for tensor in tensors.values():
        dist.all_reduce(tensor)
    return tensors
