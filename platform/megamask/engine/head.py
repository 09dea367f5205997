"""The masked-row head: logits only where the loss is.

Shapes: r rows (views of samples), s sequence, h hidden, m scored positions (fixed), v padded vocabulary, tp ranks.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megamask.diffusion.objective import ObjectiveSpec
from megamask.engine.cross_entropy import sharded_cross_entropy
from megamask.engine.network import DiffusionNetwork
from megamask.engine.topology import Topology
from megamask.errors import UsageError
from megamask.models.vocabulary import Vocabulary


class MaskedRowHead:
    """Scores positions of the last stage's hidden states over the real vocabulary.

    Padding columns never enter the softmax, on any layout; the mask token's logit does not either, unless the
    objective includes it.
    """

    def __init__(
        self, vocabulary: Vocabulary, objective: ObjectiveSpec, topology: Topology, device: torch.device
    ) -> None:
        shard = vocabulary.padded_vocab_size // topology.tensor_parallel_size
        self._first_id = topology.tensor_parallel_rank * shard
        ids = torch.arange(self._first_id, self._first_id + shard, device=device)
        self._is_excluded = ids >= vocabulary.vocab_size
        if objective.mask_logit == "excluded":
            self._is_excluded |= ids == vocabulary.mask_token_id

    def score(
        self, network: DiffusionNetwork, hidden: torch.Tensor, x_0: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the clean tokens at the chosen positions, and log Z of the softmax there, in nats.

        Shapes: hidden [s, r, h]; x_0 [r, s]; indices [m] into the flattened r*s positions; returns float32 [m] twice.
        """
        return sharded_cross_entropy(
            self.logits(network, hidden, indices),
            x_0.reshape(-1).index_select(0, indices),
            self._is_excluded,
            self._first_id,
            parallel_state.get_tensor_model_parallel_group(),
        )

    def logits(self, network: DiffusionNetwork, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's slice of the vocabulary at the chosen positions, its padding columns included.

        Shapes: hidden [s, r, h]; indices [m] into the flattened r*s positions; returns [m, v/tp].
        """
        sequence_length, num_rows = hidden.shape[:2]
        in_sequence_order = indices % sequence_length * num_rows + indices // sequence_length
        return network.project(hidden.reshape(-1, hidden.size(-1)).index_select(0, in_sequence_order))


def check_capacity(largest_count: int, capacity: int, *, micro_batch_size: int) -> None:
    """Refuses a micro-batch with more masked positions than the head computes; none may be dropped.

    Args:
        largest_count: masked positions of the fullest micro-batch, over all ranks.
        capacity: positions that the head computes for a micro-batch.

    Raises:
        UsageError: naming training.head_capacity and a value that would have been enough.
    """
    if largest_count <= capacity:
        return
    enough = -(-largest_count // micro_batch_size)
    raise UsageError(
        f"training.head_capacity is {capacity // micro_batch_size} rows per sample, but a micro-batch of "
        f"{micro_batch_size} samples has {largest_count} masked positions; this step needs at least {enough}. "
        "The step was not taken.",
        hint="raise training.head_capacity, or set it to null: training.sequence_length rows always suffice",
    )
