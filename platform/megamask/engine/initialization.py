"""Initial weights by the noise law, each rank drawing only the shards that it updates."""

from __future__ import annotations

import math

import torch

from megamask.engine.canonical import CanonicalMap
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.rectangles import rectangles
from megamask.models.initial_weights import initial_tensor


@torch.no_grad()
def set_initial_weights(optimizer: ShardedAdamW, canonical: CanonicalMap, *, seed: int) -> None:
    """Sets every weight to its float32 value under run.seed, then gathers them; collective.

    The values go to what Adam updates: in bf16 these are the float32 master weights, which so hold the law's values
    themselves and not what the rounding to bf16 leaves of them.

    Args:
        seed: run.seed.
    """
    for shard in optimizer.shards():
        shard.weight.zero_()  # vocabulary padding stays zero
        parts = rectangles(
            canonical.blocks(shard.parameter), columns=math.prod(shard.shape[1:]), start=shard.start, stop=shard.stop
        )
        for part in parts:
            index = tuple(slice(place, place + size) for place, size in zip(part.offsets, part.sizes, strict=True))
            values = initial_tensor(seed, part.name, canonical.spec, index, device=shard.weight.device)
            shard.weight[part.first : part.first + part.num_elements].copy_(values.view(-1))
    optimizer.publish_weights()
