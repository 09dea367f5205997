"""The distributed optimizer: AdamW whose state and updates are sharded over the data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, ParamWithNamePredicate, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megamask.config.schema.optimizer import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of one local parameter that this rank updates.

    Args:
        parameter: megatron-core's name of the parameter.
        shape: shape of the whole local parameter.
        start, stop: the part, in the flattened parameter.
        weight: float32 [stop - start], what Adam updates: a view of the parameter itself, or for a parameter of
            another format its master weight.
        moments: exp_avg and exp_avg_sq, like `weight`.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int
    stop: int
    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


class ShardedAdamW:
    """AdamW under megatron-core's distributed optimizer, which is used on one process too.

    Matrices decay; norms, biases and the embedding as the config says. Steps are taken in three parts, so that the
    caller can look at the gradient norm before anything changes.
    """

    def __init__(self, model: DistributedDataParallel, config: OptimizerConfig) -> None:
        self._model = model
        self._compute: torch.dtype = model.config.params_dtype
        self._clip_grad_norm = config.clip_grad_norm
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
            [model],
            {_undecayed(model, config): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
        )
        model.config.grad_scale_func = self._optimizer.scale_loss
        self._sharded = self._optimizer.chained_optimizers[0]
        for group in self._sharded.optimizer.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]

    def zero_gradients(self) -> None:
        """Forgets the gradients of the step before."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Makes the summed gradients ready for the update; returns their global norm, the same on every rank."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def update(self, *, learning_rate: float, gradient_norm: float) -> None:
        """Clips to the configured norm, updates this rank's shards and gathers the new weights."""
        if not math.isfinite(gradient_norm):
            raise ValueError("an update needs a finite gradient norm")
        for group in self._sharded.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        if self._clip_grad_norm > 0:
            clip_grad_by_total_norm_fp32(self._sharded.get_parameters(), self._clip_grad_norm, gradient_norm)
        self._sharded.optimizer.step()
        self.publish_weights()

    @property
    def has_masters(self) -> bool:
        """Whether the weights that Adam updates are others than the network's own."""
        return self._compute != torch.float32

    @property
    def num_updates(self) -> int:
        """Updates taken so far, as Adam's bias correction counts them."""
        return max((int(group.get("step") or 0) for group in self._groups), default=0)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        """Updates made so far; it is saved with the state."""
        for group in self._groups:
            group["step"] = value

    def shards(self) -> Iterator[Shard]:
        """This rank's shards, in the network's order; moments that do not exist yet are made, as zeros."""
        for name, parameter in self._model.module.named_parameters():
            if parameter not in self._sharded.model_param_group_index_map:
                continue  # another data-parallel rank updates all of it
            group, order = self._sharded.model_param_group_index_map[parameter]
            weight = self._groups[group]["params"][order]
            state = self._sharded.optimizer.state[weight]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(weight)
            part = self._sharded._get_model_param_range_map(parameter)["param"]
            yield Shard(
                parameter=name,
                shape=tuple(parameter.shape),
                start=part.start,
                stop=part.end,
                weight=weight.detach(),
                moments={moment: state[moment] for moment in MOMENTS},
            )

    def publish_weights(self) -> None:
        """Rounds master weights to the parameters' format and gathers every rank's shards into whole parameters."""
        if self.has_masters:  # float32 shards are views of the parameters already
            self._sharded._copy_main_params_to_model_params()
        self._model.start_param_sync(force_sync=True)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._sharded.optimizer.param_groups
        return groups


def _undecayed(model: DistributedDataParallel, config: OptimizerConfig) -> ParamKey:
    """Selects the parameters without weight decay; a checkpoint does not know of such groups."""
    embeddings = ["embedding.word_embeddings.weight"]
    if model.module.share_embeddings_and_output_weights:
        embeddings.append("output_layer.weight")  # on the last pipeline stage the same tensor has this name

    def is_undecayed(parameter: torch.Tensor, name: str) -> bool:
        if name.endswith(".bias"):
            return not config.weight_decay_on_biases
        if "layernorm" in name:
            return not config.weight_decay_on_norms
        return name.endswith(tuple(embeddings)) and not config.weight_decay_on_embeddings

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="undecayed", fn=is_undecayed))
