"""Digest of a rank's weights, by which two runs are compared bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.parameters import named_buffers, named_parameters


def weights_digest(networks: Sequence[torch.nn.Module], optimizer: ShardedAdamW) -> str:
    """Return the sha256 of this rank's parameters and buffers, ordered by name, then of its float32 masters."""
    digest = hashlib.sha256()
    named = (*named_parameters(networks), *named_buffers(networks))
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    if optimizer.has_masters:
        for shard in optimizer.shards():
            digest.update(_bytes_of(shard.weight))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
