"""Agreement between ranks: small, exact values that every rank must know alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megamask.errors import ExitCode, MegamaskError, error_with_code


class Collectives:
    """Collective calls over all ranks of the job; every rank must make each of them, in the same order.

    Args:
        device: where tensors must live for the process group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """True if this is global rank 0."""
        return self.rank == 0

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Element-wise sums, exact; the sums must fit 64 bits with sign."""
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return [int(value) for value in tensor.tolist()]

    def max_integer(self, value: int) -> int:
        """The largest value of any rank."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def sum_doubles(self, values: torch.Tensor) -> list[float]:
        """Element-wise sums in float64 [n]; the same bits on every rank, and again on the same layout."""
        tensor = values.to(dtype=torch.float64, device=self._device, copy=True)
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return [float(value) for value in tensor.tolist()]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def raise_alike(self, failures: Sequence[BaseException], kind: type[MegamaskError]) -> None:
        """Return if no rank failed; otherwise raises on every rank, so that none waits for one that has gone.

        A rank that failed raises its own error; the others raise one that quotes the first rank's: of `kind` if the
        storage or the state was to blame, else a plain one (a bug).
        """
        failures_of_ranks = self.gather_objects(_describe(failures[0], kind) if failures else None)
        if failures:
            raise failures[0]
        for rank, entry in enumerate(failures_of_ranks):
            if entry is not None:
                raise error_with_code(entry[0], f"rank {rank}: {entry[1]}")

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.max_integer(0)


def _describe(error: BaseException, kind: type[MegamaskError]) -> tuple[int, str]:
    text = str(error) or type(error).__name__
    if isinstance(error, MegamaskError):
        return int(error.exit_code), text
    if isinstance(error, OSError):
        return int(kind.exit_code), text
    return int(ExitCode.BUG), f"{type(error).__name__}: {text}"
