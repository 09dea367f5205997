"""The distributed optimizer: AdamW whose state and updates are sharded over the data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.engine.parameters import ParameterInfo, ParameterTable, named_buffers, named_parameters
from megamask.models.spec import ModelSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one local parameter that this rank updates.

    Args:
        info: the parameter.
        start, stop: the part, in the flattened parameter.
        weight: float32 [stop - start], the tensor that Adam updates: a view of the parameter itself, or for a parameter
            of another format its master weight.
        moments: exp_avg and exp_avg_sq, like `weight`; none of a buffer.
    """

    info: ParameterInfo
    start: int
    stop: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


class ShardedAdamW:
    """AdamW under megatron-core's distributed optimizer, which is used on one process too.

    Steps are taken in three parts, so that the caller can look at the gradient norm before anything changes.

    megatron-core builds one optimizer for the dense parameters and, where a rank has experts, a second one for them:
    each part of a step runs over all of them.

    Args:
        table: of the model's parameters; it decides decay and learning-rate factor of each.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], table: ParameterTable, config: OptimizerConfig
    ) -> None:
        self._chunks = list(chunks)
        self._table = table
        self._compute: torch.dtype = chunks[0].config.params_dtype
        self._clip_grad_norm = config.clip_grad_norm
        self._gathers_late: bool = chunks[0].ddp_config.overlap_param_gather
        self._optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.learning_rate,
                min_lr=config.min_learning_rate,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=0.0,  # clipped here, after the norm was found finite
                bf16=self._compute == torch.bfloat16,
                params_dtype=self._compute,
                use_distributed_optimizer=True,
            ),
            self._chunks,
            _group_overrides(self._parameters(), table),
            use_gloo_process_groups=False,
        )
        for chunk in self._chunks:
            chunk.config.grad_scale_func = self._optimizer.scale_loss
        # A rank without parameters of a kind has an optimizer of that kind that does nothing.
        self._sharded = [part for part in self._optimizer.chained_optimizers if not part.is_stub_optimizer]
        for group in self._groups():
            group["weight_decay"] = config.weight_decay * group["wd_mult"]

    def zero_gradients(self) -> None:
        """Clear the gradients of the previous step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def squared_gradient_norm(self) -> torch.Tensor:
        """Average gradients; return this rank's share of their squared norm, a float32 scalar on the device.

        Added up over all ranks it is the square of the norm: each gradient counts on one rank only. Parameters that a
        learning-rate factor of 0 freezes have none.
        """
        for name, parameter in self._parameters():
            if self._table[name].lr_multiplier == 0:
                parameter.main_grad.zero_()  # type: ignore[attr-defined]  # megatron-core's buffer
        self._optimizer.prepare_grads()
        gradients = [gradient for part in self._sharded for gradient in part.get_main_grads_for_grad_norm()]
        device = next(self._chunks[0].module.parameters()).device
        if not gradients:
            return torch.zeros((), device=device)
        no_overflow = torch.zeros(1, dtype=torch.int, device=device)
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, no_overflow, [gradients], False)
        return torch.square(norm).reshape(())

    def update(self, *, learning_rate: float, gradient_norm: float) -> None:
        """Clip to the configured norm, update this rank's shards and gather the new weights.

        Under device.overlap_parameter_gather each part is gathered when the next forward pass first needs it.
        """
        if not math.isfinite(gradient_norm):
            raise ValueError("an update needs a finite gradient norm")
        for group in self._groups():
            group["lr"] = learning_rate * group["lr_mult"]
        for part in self._sharded:
            if self._clip_grad_norm > 0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self._clip_grad_norm, gradient_norm)
            part.optimizer.step()
        self._round_weights()
        if not self._gathers_late:  # otherwise the modules do, in the next forward pass
            self.gather_weights()

    @property
    def spec(self) -> ModelSpec:
        """The network whose parameters these are."""
        return self._table.spec

    @property
    def has_masters(self) -> bool:
        """True if Adam updates master weights beside the network's own."""
        return self._compute != torch.float32

    @property
    def num_updates(self) -> int:
        """Updates taken so far, as Adam's bias correction counts them."""
        return max((int(group.get("step") or 0) for group in self._groups()), default=0)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        """Updates taken so far; saved with the state."""
        for group in self._groups():
            group["step"] = value

    def shards(self) -> Iterator[Shard]:
        """This rank's shards, in the network's order, then its buffers; missing moments are made, as zeros."""
        for name, parameter in self._parameters():
            owner = next((part for part in self._sharded if parameter in part.model_param_group_index_map), None)
            if owner is None:
                continue  # another data-parallel rank updates all of it
            group, order = owner.model_param_group_index_map[parameter]
            weight = owner.optimizer.param_groups[group]["params"][order]
            state = owner.optimizer.state[weight]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(weight)
            part = owner._get_model_param_range_map(parameter)["param"]
            yield Shard(
                info=self._table[name],
                start=part.start,
                stop=part.end,
                weight=weight.detach(),
                moments={moment: state[moment] for moment in MOMENTS},
            )

        for name, buffer in named_buffers([chunk.module for chunk in self._chunks]):
            # every rank that has the layer moves them alike, by rule
            yield Shard(info=self._table[name], start=0, stop=buffer.numel(), weight=buffer, moments={})

    def publish_weights(self) -> None:
        """Round master weights to the parameters' format and gather every rank's shards into complete parameters."""
        self._round_weights()
        self.gather_weights()

    def gather_weights(self) -> None:
        """Gather what an update has left to the next forward pass, and wait for it."""
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def _round_weights(self) -> None:
        if self.has_masters:  # float32 shards are views of the parameters already
            for part in self._sharded:
                part._copy_main_params_to_model_params()

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(named_parameters([chunk.module for chunk in self._chunks]))

    def _groups(self) -> Iterator[dict[str, Any]]:
        for part in self._sharded:
            yield from part.optimizer.param_groups


def norm_of(squared: float) -> float:
    """The norm whose square was added up over the ranks; rounded to float32, in which each rank computed its share."""
    rounded: float = torch.tensor(squared, dtype=torch.float32).item() ** 0.5
    return rounded


def _group_overrides(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], table: ParameterTable
) -> dict[ParamKey, dict[str, float]]:
    """megatron-core's description of the parameter groups, one for each decay and learning-rate factor.

    A checkpoint does not contain these groups: their settings come from the config of the run that loads it.
    """
    members: dict[tuple[bool, float], set[int]] = {}
    for name, parameter in parameters:
        info = table[name]
        members.setdefault((info.decays, info.lr_multiplier), set()).add(id(parameter))
    overrides: dict[ParamKey, dict[str, float]] = {}
    for (decays, lr_multiplier), ids in members.items():
        override = ({} if decays else {"wd_mult": 0.0}) | ({} if lr_multiplier == 1.0 else {"lr_mult": lr_multiplier})
        if override:
            predicate = ParamPredicate(name=f"decays={decays}, lr={lr_multiplier}", fn=_member_of(ids))
            overrides[ParamKey(predicate=predicate)] = override
    return overrides


def _member_of(ids: set[int]) -> Any:
    def is_member(parameter: torch.Tensor) -> bool:
        return id(parameter) in ids

    return is_member
