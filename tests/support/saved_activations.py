"""Bytes that torch keeps for the backward pass of a rank's stage, counted where autograd saves them."""

from __future__ import annotations

from typing import Any

import torch

from megamask.engine.sequence import sequence_part
from megamask.models.context import Context


def saved_bytes(engine: Any, *, num_rows: int, length: int) -> int:
    """Bytes of distinct memory that a forward pass saves, the parameters' own left out.

    Args:
        engine: of one pipeline stage.
        length: positions of a row on this rank's mesh, before any axis divides them.
    """
    rank_model = engine._rank_model
    (network,) = rank_model.networks
    if rank_model.routing is not None:
        rank_model.routing.begin_step(num_rows=num_rows)
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = torch.randint(0, 50, (num_rows, length), generator=torch.Generator().manual_seed(3))
    part = sequence_part(rank_model.mesh, rank_model.groups, length, inputs.device)
    if part is not None:
        inputs = inputs[:, part.places]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = network.encode(inputs, Context(), part)
        assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def run_ranks(runs: list[Any]) -> list[int]:
    """The bytes of each run on this rank: (spec, layout, number format, recomputation, length)."""
    from megamask.models.spec import ModelSpec
    from support import engine_cases

    found = []
    for spec, layout, compute, recompute, length in runs:
        engine = engine_cases.make_engine(ModelSpec.from_json(spec), layout, compute=compute, recompute=recompute)
        found.append(saved_bytes(engine, num_rows=2, length=length))
        engine.close()
    return found
