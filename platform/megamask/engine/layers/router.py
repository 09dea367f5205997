"""The router of a layer's experts as a megatron-core module, and what all routers of a rank share.

Whatever spreads tokens over the experts depends on rows and on the global batch, never on a micro-batch, so that every
layout routes alike: expert choice and the balance loss look at complete rows, the bias at the counts of a step. The
exception is a balance loss of micro-batches, which training.allow_layout_dependent permits.

Shapes: t tokens of this rank (c positions of b rows, position first), s positions of a row, e experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.engine.backend import Backend
from megamask.engine.mesh import ProcessGroups
from megamask.engine.sequence import SequencePart
from megamask.models.experts import ExpertSpec
from megamask.models.routing import balance_loss, experts_choose, moved_bias, router_scores, tokens_choose
from megamask.models.spec import ModelSpec


class Routing:
    """State that the routers of a rank share: the step's divisor, its counts and its balance loss.

    Args:
        row_group: ranks that hold the parts of the same rows: the tensor-parallel ranks under sequence parallelism, and
            the context-parallel ranks.
        balances_rows: the balance loss is one of each row; otherwise of the tokens of a micro-batch together, and then
            depends on the layout.
    """

    def __init__(
        self,
        experts: ExpertSpec,
        num_layers: int,
        *,
        row_group: dist.ProcessGroup,
        device: torch.device,
        balances_rows: bool = True,
    ) -> None:
        self.experts = experts
        self._balances_rows = balances_rows
        self.row_group = row_group
        self.part: SequencePart | None = None
        self._rows_of_step = 1
        self._counts = torch.zeros(num_layers, experts.num_experts, dtype=torch.int64, device=device)
        self._balance = torch.zeros((), dtype=torch.float64, device=device)
        self._routers: dict[int, Router] = {}

    def register(self, router: Router, layer: int) -> None:
        """Note the router of a layer, by its global number."""
        self._routers[layer] = router

    def begin_step(self, *, num_rows: int) -> None:
        """Forget the step before.

        Args:
            num_rows: rows of the global batch, all views.
        """
        self._rows_of_step = num_rows
        self._counts.zero_()
        self._balance.zero_()

    @property
    def counts(self) -> torch.Tensor:
        """Int64 [layers, e]: this rank's tokens of the step by layer and expert; 0 for layers of other ranks."""
        return self._counts

    @property
    def balance(self) -> torch.Tensor:
        """This rank's share of the step's balance loss, float64."""
        return self._balance

    def note(self, layer: int, is_chosen: torch.Tensor) -> None:
        """Count the tokens of a training pass: passes without a gradient, evaluation's among them, are not counted."""
        if torch.is_grad_enabled():
            self._counts[layer] += is_chosen.sum(dim=0)

    def add_balance(self, weights: torch.Tensor, scores: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
        """The weights, with the gradient of the balance loss attached. Shapes: [c, b, e] each."""
        if self.experts.balance_weight == 0 or not torch.is_grad_enabled():
            return weights
        counts = is_chosen.sum(dim=0)
        positions = torch.tensor(is_chosen.size(0), device=counts.device)
        dist.all_reduce(counts, group=self.row_group)
        dist.all_reduce(positions, group=self.row_group)
        shares = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=0)
        rows = 1
        if not self._balances_rows:  # as if the rows were a single long one, which weighs as much as all of them
            rows = counts.size(0)
            shares, counts = shares.sum(dim=0, keepdim=True), counts.sum(dim=0, keepdim=True)
        loss = rows * balance_loss(shares, counts, self.experts, rows * int(positions))
        loss = loss * (self.experts.balance_weight / self._rows_of_step)
        self._balance += loss.detach().double()
        attached: torch.Tensor = _AttachLoss.apply(weights, loss)  # type: ignore[no-untyped-call]
        return attached

    def choose_in_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [c, b, e]: the tokens that the experts take, from the scores [c, b, e] of this rank's positions."""
        with torch.no_grad():
            found = gather_from_sequence_parallel_region(scores.detach(), group=self.row_group)
            # the parts lie end to end: those of tensor-parallel ranks inside those of context-parallel ranks
            order = None if self.part is None else self.part.order
            complete = found if order is None else found.index_select(0, order)
            taken = experts_choose(complete.transpose(0, 1), self.experts).transpose(0, 1)
            if order is not None:
                taken = torch.empty_like(taken).index_copy_(0, order, taken)
            size, rank = scores.size(0), dist.get_rank(self.row_group)
            return taken[rank * size : (rank + 1) * size]

    @torch.no_grad()
    def move_biases(self, counts: torch.Tensor) -> None:
        """Move the biases of this rank's routers by the counts [layers, e] of the global batch."""
        for layer, router in self._routers.items():
            if router.expert_bias is not None:
                router.expert_bias.copy_(
                    moved_bias(router.expert_bias, counts[layer].to(router.expert_bias.device), self.experts.bias_rate)
                )


def routing_of(spec: ModelSpec, groups: ProcessGroups, backend: Backend, *, balances_rows: bool) -> Routing | None:
    """State that the routers of this rank share; None for a dense network."""
    if spec.experts is None:
        return None
    backend.prepare_experts()
    return Routing(
        spec.experts,
        spec.num_layers,
        row_group=groups.tensor_and_context,
        device=backend.device,
        balances_rows=balances_rows,
    )


class _AttachLoss(torch.autograd.Function):
    """Passes a tensor on; a loss beside it gets the gradient 1 when the tensor gets its own."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


class Router(torch.nn.Module):
    """Chooses experts for tokens; scores and weights are float32 in every format.

    Args:
        routing: shared by the routers of a rank.
    """

    expert_bias: torch.Tensor | None

    def __init__(self, config: TransformerConfig, *, routing: Routing, **unused: Any) -> None:
        super().__init__()
        experts, device = routing.experts, torch.cuda.current_device()
        self._routing = routing
        self._layer = -1
        self.weight = torch.nn.Parameter(
            torch.empty(experts.num_experts, config.hidden_size, dtype=config.params_dtype, device=device)
        )
        # each rank routes its own part of the sequence: the gradients of the parts are added up
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - no attribute torch knows
        bias = torch.zeros(experts.num_experts, dtype=torch.float32, device=device) if experts.has_bias else None
        self.register_buffer("expert_bias", bias)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the global number of the layer, which megatron-core counts from 1."""
        self._layer = layer_number - 1
        self._routing.register(self, self._layer)

    def forward(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: hidden [c, b, h] -> weights float32 [t, e], is chosen bool [t, e]."""
        experts, routing = self._routing.experts, self._routing
        scores = router_scores(F.linear(hidden.float(), self.weight.float()), experts)  # [c, b, e]
        if experts.choice == "experts":
            is_chosen = routing.choose_in_rows(scores).flatten(0, 1)
            weights = scores.flatten(0, 1).masked_fill(~is_chosen, 0.0) * experts.scale
        else:
            weights, is_chosen = tokens_choose(scores.flatten(0, 1), experts, self.expert_bias)
            weights = routing.add_balance(weights.view_as(scores), scores, is_chosen.view_as(scores)).flatten(0, 1)
        routing.note(self._layer, is_chosen)
        return weights, is_chosen


def router_of(routing: Routing) -> Callable[..., Router]:
    """A builder of routers, as megatron-core's specification wants it."""

    def build(*, config: TransformerConfig, pg_collection: Any = None) -> Router:
        return Router(config, routing=routing)

    return build
