"""The two passes through megatron-core's pipeline schedule: one that trains, one that only looks.

Every pipeline stage takes each micro-batch in turn; the schedule hands `forward_step` the model chunk to run, which is
one of several where a rank holds more than one (virtual pipeline stages).

Shapes: r rows of a micro-batch, i input positions, c of them on this rank (all but under context parallelism), h hidden
channels, m scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamask.engine.backend import Backend
from megamask.engine.collectives import Collectives
from megamask.engine.head import ScoredRowHead
from megamask.engine.layers.router import Routing
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import DiffusionNetwork
from megamask.engine.sequence import SequencePart, sequence_part
from megamask.models.context import Context
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """One rank's part of the network, its coordinates on the mesh, and the objective.

    Args:
        routing: what the routers of this rank share; None for a dense network.
        chunks: this rank's stages with their gradient buffers, in the network's order; one without virtual stages.
    """

    mesh: Mesh
    groups: ProcessGroups
    backend: Backend
    collectives: Collectives
    chunks: tuple[DistributedDataParallel, ...]
    head: ScoredRowHead
    vocabulary: Vocabulary
    objective: Objective
    routing: Routing | None = None

    @property
    def networks(self) -> list[DiffusionNetwork]:
        """This rank's stages."""
        return [chunk.module for chunk in self.chunks]

    @property
    def network(self) -> DiffusionNetwork:
        """The first of this rank's stages."""
        return self.networks[0]

    def part(self, num_positions: int) -> SequencePart | None:
        """This rank's positions of rows of that length; None for all."""
        return sequence_part(self.mesh, self.groups, num_positions, self.backend.device)


@dataclass(frozen=True, kw_only=True)
class PassInput:
    """Input of a pipeline stage from one micro-batch.

    Args:
        inputs: int64 [r, i] token ids of complete rows; None on ranks that have no embedding.
        context: positions, documents and attention, on every stage.
    """

    inputs: torch.Tensor | None
    context: Context


LastStage = Callable[[DiffusionNetwork, torch.Tensor, int], torch.Tensor]
"""(network, hidden [c, r, h], number of the micro-batch) -> what the last stage makes of it."""


def train(
    rank_model: RankModel, micro_batches: Sequence[PassInput], loss_share: LastStage, *, shape: tuple[int, int]
) -> None:
    """Forward and backward over all micro-batches; gradients are added up in the buffers.

    Args:
        loss_share: on the last stage: a micro-batch's share of the loss, a scalar with a gradient. Nothing divides it
            afterwards.
        shape: (r, i), the same for every micro-batch.
    """
    no_count = torch.zeros((), dtype=torch.int, device=rank_model.backend.device)  # of megatron-core's own division

    def last_stage(network: DiffusionNetwork, hidden: torch.Tensor, number: int) -> tuple[torch.Tensor, Any]:
        share = loss_share(network, hidden, number)
        return share, lambda share: (share, no_count, {})

    _run(rank_model, micro_batches, last_stage, shape=shape, forward_only=False)


@torch.no_grad()
def forward_only(
    rank_model: RankModel, micro_batches: Sequence[PassInput], look: LastStage, *, shape: tuple[int, int]
) -> list[torch.Tensor]:
    """Return the result of `look` for each micro-batch on the last stage; training's state is unchanged.

    Arguments as for `train`.
    """
    found: list[torch.Tensor] = []
    num_given = len(micro_batches)
    if len(rank_model.chunks) > 1:  # an interleaved schedule takes micro-batches in groups, one for each pipeline rank
        missing = -num_given % rank_model.mesh.pipeline_parallel_size
        micro_batches = [*micro_batches, *[micro_batches[-1]] * missing]

    def last_stage(network: DiffusionNetwork, hidden: torch.Tensor, number: int) -> tuple[torch.Tensor, Any]:
        if number < num_given:
            found.append(look(network, hidden, number))
        one = torch.ones((), dtype=torch.int, device=hidden.device)
        return hidden, lambda hidden: (hidden.new_zeros(()), one, {})

    _run(rank_model, micro_batches, last_stage, shape=shape, forward_only=True)
    return found


def share_with_stages(rank_model: RankModel, answer: torch.Tensor) -> torch.Tensor:
    """The last stage's answer, on every pipeline stage; others give a tensor of the same shape to receive it in."""
    rank_model.groups.broadcast_from_last_stage(answer)
    return answer


def _run(
    rank_model: RankModel,
    micro_batches: Sequence[PassInput],
    last_stage: Callable[[DiffusionNetwork, torch.Tensor, int], tuple[torch.Tensor, Any]],
    *,
    shape: tuple[int, int],
    forward_only: bool,
) -> None:
    part = rank_model.part(shape[1])
    if rank_model.routing is not None:
        rank_model.routing.part = part

    # The schedule decides the order: with pipeline stages it interleaves forward and backward passes of several
    # micro-batches, with virtual stages of several chunks too. So the number of a micro-batch travels with its input,
    # and the network is that of the chunk that the schedule hands over.
    def forward_step(
        numbered: Iterator[tuple[int, PassInput]], chunk: DistributedDataParallel
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        number, micro_batch = next(numbered)
        network: DiffusionNetwork = chunk.module
        # First stage: ids [r, i] -> hidden [i, r, h]. Later stages: hidden states of the stage before, which
        # megatron-core receives. Context parallelism and sequence parallelism each divide i by their ranks.
        inputs = micro_batch.inputs if network.pre_process else None
        if inputs is not None and part is not None:
            inputs = inputs[:, part.places]
        output = network.encode(inputs, micro_batch.context, part)
        return last_stage(network, output, number) if network.post_process else (output, _no_loss)

    numbered = list(enumerate(micro_batches))
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(numbered) for _ in rank_model.chunks] if len(rank_model.chunks) > 1 else iter(numbered),
        model=list(rank_model.chunks),
        num_microbatches=len(micro_batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
    )


def _no_loss(output: torch.Tensor) -> Any:
    raise AssertionError("only the last pipeline stage has a loss")
