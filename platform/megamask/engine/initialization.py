"""Initial weights by the noise law, each rank drawing only the shards that it updates."""

from __future__ import annotations

import torch

from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.state.slices import range_parts
from megamask.models.initial_weights import initial_tensor
from megamask.models.spec import ModelSpec


@torch.no_grad()
def set_initial_weights(optimizer: ShardedAdamW, spec: ModelSpec, *, seed: int) -> None:
    """Set every weight to its float32 value under run.seed, then gather them; collective.

    The values go to the tensors that Adam updates: in bf16 these are the float32 master weights, which so hold the
    law's values themselves and not their rounding to bf16.

    Args:
        seed: run.seed.
    """
    for shard in optimizer.shards():
        shard.weight.zero_()  # vocabulary padding stays zero
        parts = range_parts(shard.info.canonical, columns=shard.info.num_columns, start=shard.start, stop=shard.stop)
        for part in parts:
            index = tuple(slice(place, place + size) for place, size in zip(part.offsets, part.sizes, strict=True))
            values = initial_tensor(seed, part.name, spec, index, device=shard.weight.device)
            shard.weight[part.first : part.first + part.num_elements].copy_(values.view(-1))
    optimizer.publish_weights()
