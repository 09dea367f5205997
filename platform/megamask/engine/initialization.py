"""Initial weights by the noise law, each rank drawing only the shards that it updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megamask.engine.collectives import Collectives
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.state.slices import StoredSlice, range_parts, slices_of
from megamask.errors import MegamaskError
from megamask.models.initial_weights import initial_tensor
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec


@torch.no_grad()
def set_initial_weights(optimizer: ShardedAdamW, spec: ModelSpec, *, seed: int | None) -> None:
    """Set every weight to its float32 value under run.seed, then gather them; collective.

    The values go to the tensors that Adam updates: in bf16 these are the float32 master weights, which so hold the
    law's values themselves and not their rounding to bf16.

    Args:
        seed: run.seed; None leaves every weight at zero, for weights that come from elsewhere.
    """
    for shard in optimizer.shards():
        shard.weight.zero_()  # vocabulary padding stays zero
        if seed is None:
            continue
        parts = range_parts(shard.info.canonical, columns=shard.info.num_columns, start=shard.start, stop=shard.stop)
        for part in parts:
            index = tuple(slice(place, place + size) for place, size in zip(part.offsets, part.sizes, strict=True))
            values = initial_tensor(seed, part.name, spec, index, device=shard.weight.device)
            shard.weight[part.first : part.first + part.num_elements].copy_(values.view(-1))
    optimizer.publish_weights()


@torch.no_grad()
def read_weights(
    optimizer: ShardedAdamW,
    spec: ModelSpec,
    read: Callable[[Sequence[StoredSlice]], None],
    collectives: Collectives,
) -> None:
    """Set every weight from a source, each rank reading only the shards that it updates, then gather them; collective.

    Args:
        read: fills rectangles of canonical tensors in float32.

    Raises: what `read` raises, on every rank alike.
    """
    failures: list[BaseException] = []
    names = canonical_shapes(spec)
    slices = [each for each in slices_of(optimizer.shards(), spec) if each.name in names]
    try:
        for each in slices:
            on_host = replace(each, data=torch.empty(each.data.shape, dtype=torch.float32))
            read([on_host])
            each.data.copy_(on_host.data)
    except Exception as error:  # noqa: BLE001  raised on every rank
        failures.append(error)
    collectives.raise_alike(failures, MegamaskError)
    optimizer.publish_weights()
