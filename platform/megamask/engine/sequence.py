"""The part of each row that a context-parallel rank computes.

A row of i input positions is cut into 2 * cp equal pieces; rank r computes the pieces r and 2 * cp - 1 - r. Of a causal
pattern both together see as many keys on every rank, and of a doubled input every rank has a piece of both halves; a
bidirectional row needs no such balance and loses nothing by it. It is also the order that Transformer Engine's ring
expects. Ids, targets, weights, positions and documents are made for complete rows, by the noise law, and then cut.

Shapes: r rows, i input positions, c = i / cp positions of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.objectives.base import Rows


@dataclass(frozen=True, kw_only=True)
class SequencePart:
    """This rank's positions of every row.

    Args:
        places: int64 [c], this rank's positions in the row, ascending.
        order: int64 [i]: where each position of the row is found when the ranks' parts are laid end to end.
        group: the ranks that hold the other parts.
    """

    places: Tensor
    order: Tensor
    group: dist.ProcessGroup

    def of_rows(self, rows: Rows) -> Rows:
        """This rank's columns [r, c] of what is read and scored; the context stays that of the complete rows."""
        return replace(
            rows,
            inputs=rows.inputs[:, self.places],
            targets=rows.targets[:, self.places],
            is_scored=rows.is_scored[:, self.places],
            weight=rows.weight[:, self.places],
            group=rows.group[:, self.places],
            part=None if rows.part is None else rows.part[:, self.places],
            noised=None if rows.noised is None else rows.noised.columns(self.places),
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """All positions of the rows in their order, [c, ...] -> [i, ...]; its gradient is summed over the ranks."""
        together: Tensor = gather_from_sequence_parallel_region(tensor, group=self.group)
        return together.index_select(0, self.order)


def places_of_rank(num_positions: int, size: int, rank: int) -> list[int]:
    """Positions of a row that a context-parallel rank computes.

    Raises:
        ValueError: the row cannot be cut into 2 * size equal pieces.
    """
    if num_positions % (2 * size) != 0:
        raise ValueError(f"a row of {num_positions} positions cannot be cut into {2 * size} equal pieces")
    piece = num_positions // (2 * size)
    return [place for number in (rank, 2 * size - 1 - rank) for place in range(number * piece, (number + 1) * piece)]


def sequence_part(mesh: Mesh, groups: ProcessGroups, num_positions: int, device: torch.device) -> SequencePart | None:
    """This rank's part of rows of that length; None where it computes complete rows."""
    size = mesh.context_parallel_size
    if size == 1:
        return None
    parts = [places_of_rank(num_positions, size, rank) for rank in range(size)]
    end_to_end = torch.tensor([place for part in parts for place in part], device=device)
    order = torch.empty_like(end_to_end)
    order[end_to_end] = torch.arange(num_positions, device=device)
    places = torch.tensor(parts[mesh.context_parallel_rank], device=device)
    return SequencePart(places=places, order=order, group=groups.context)
