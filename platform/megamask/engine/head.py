"""The head: logits only at the positions that are scored.

Shapes: r rows, i input positions, h hidden, m scored positions (fixed), v padded vocabulary, tp ranks.
"""

from __future__ import annotations

import torch

from megamask.engine.cross_entropy import sharded_cross_entropy
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import DiffusionNetwork
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import is_excluded


class ScoredRowHead:
    """Scores positions of the last stage's hidden states over the real vocabulary.

    Args:
        excluded_ids: ids that never enter the softmax (`Objective.excluded_ids`); columns that pad the vocabulary do
            not either, on any layout.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        excluded_ids: frozenset[int],
        mesh: Mesh,
        groups: ProcessGroups,
        device: torch.device,
    ) -> None:
        shard = vocabulary.padded_vocab_size // mesh.tensor_parallel_size
        self._group = groups.tensor
        self.first_id = mesh.tensor_parallel_rank * shard
        self._ids = torch.arange(self.first_id, self.first_id + shard, device=device)
        self._vocabulary = vocabulary
        self._is_excluded = self.columns_without(excluded_ids)

    def columns_without(self, excluded_ids: frozenset[int]) -> torch.Tensor:
        """Bool [v/tp]: columns of this rank that take no part in a softmax without these ids."""
        return is_excluded(self._ids, self._vocabulary, excluded_ids)

    def score(
        self, network: DiffusionNetwork, hidden: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the targets at the chosen positions, and log Z of the softmax there, in nats.

        Shapes: hidden [i, r, h]; targets [r, i]; indices [m] into the flattened r*i positions; returns float32 [m]
        twice.
        """
        return sharded_cross_entropy(
            self.logits(network, hidden, indices),
            targets.reshape(-1).index_select(0, indices),
            self._is_excluded,
            self.first_id,
            self._group,
        )

    def logits(self, network: DiffusionNetwork, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's slice of the vocabulary at the chosen positions, its padding columns included.

        Shapes: hidden [i, r, h]; indices [m] into the flattened r*i positions; returns [m, v/tp].
        """
        sequence_length, num_rows = hidden.shape[:2]
        # the network keeps the sequence first: place (row, position) of [r, i] is place (position, row) of [i, r]
        in_sequence_order = indices % sequence_length * num_rows + indices // sequence_length
        return network.project(hidden.reshape(-1, hidden.size(-1)).index_select(0, in_sequence_order))
