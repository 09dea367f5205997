"""Noise on the embeddings of masked positions, on any layout (models/context.py, EmbeddingNoise).

Shapes: r rows, i input positions, h hidden channels, tp tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from megamask.engine.mesh import Mesh
from megamask.models.context import EmbeddingNoise


def with_noise(table: Any, mesh: Mesh) -> Any:
    """Let a table of embeddings add the noise of its attribute `noise`: the noise, and the places of its positions.

    The parameter keeps its name and place, so nothing else knows of it.
    """
    table.noise = (None, None)

    def add(module: Any, arguments: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        noise, places = module.noise
        return embedded if noise is None else _added(noise, arguments[0], places, embedded, mesh)

    table.register_forward_hook(add)
    return table


def _added(
    noise: EmbeddingNoise, ids: torch.Tensor, places: torch.Tensor | None, embedded: torch.Tensor, mesh: Mesh
) -> torch.Tensor:
    """Shapes: ids [r, i]; embedded [r, i, h], or [i/tp, r, h] under sequence parallelism, which splits positions.

    Args:
        places: int64 [i], where this rank's positions are in the row; None for all of them in order.
    """
    is_noised = ids == noise.token_id
    is_split = embedded.shape[:2] != ids.shape or mesh.sequence_parallel
    if is_split:
        size = embedded.size(0)
        first = mesh.tensor_parallel_rank * size
        is_mine = torch.zeros_like(is_noised)
        is_mine[:, first : first + size] = True
        is_noised = is_noised & is_mine
    values = torch.zeros((*ids.shape, embedded.size(-1)), dtype=torch.float32, device=embedded.device)
    values[is_noised] = noise.values(is_noised, embedded.size(-1), places)
    if is_split:
        values = values[:, first : first + size].transpose(0, 1)
    return embedded + values.to(embedded.dtype)
