"""Layers with experts: the attention of any layer family, and megatron-core's dispatch of tokens to experts.

Experts are computed one after another with megatron-core's linear modules, or together with Transformer Engine's
grouped ones (device.experts); the router is megamask's.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megamask.engine.layers.router import Routing, router_of
from megamask.engine.mesh import Mesh
from megamask.models.spec import ModelSpec


def with_experts(
    block: TransformerBlockSubmodules, layers: range, spec: ModelSpec, routing: Routing, *, are_grouped: bool
) -> TransformerBlockSubmodules:
    """Replace the dense feed-forward part of the layers that have experts.

    Args:
        block: of a stage, as a layer family specifies it.
        layers: global numbers of its layers.
        are_grouped: a layer's experts on this rank are one grouped matrix product, by Transformer Engine.
    """
    expert_layer, specs = _expert_layer(routing, _grouped_experts() if are_grouped else _sequential_experts()), []
    for layer, dense in zip(layers, block.layer_specs, strict=True):
        found = dense
        if spec.has_experts(layer):
            found = copy.copy(dense)
            found.submodules = copy.copy(dense.submodules)
            found.submodules.mlp = expert_layer
        specs.append(found)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=block.layer_norm)


_MATRICES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _sequential_experts() -> ModuleSpec:
    return ModuleSpec(module=SequentialMLP, submodules=_MATRICES)


def _grouped_experts() -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    matrices = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    return ModuleSpec(module=TEGroupedMLP, submodules=matrices)


def _expert_layer(routing: Routing, experts: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=experts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_MATRICES),
            router=router_of(routing),
        ),
    )


def expert_settings(spec: ModelSpec, mesh: Mesh) -> dict[str, Any]:
    """The settings of the experts in megatron-core's configuration."""
    experts = spec.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_hidden_size or None,
        "moe_layer_freq": [int(spec.has_experts(layer)) for layer in range(spec.num_layers)],
        "moe_router_load_balancing_type": "none",  # the router's own business
        # The all-to-all dispatcher takes topk experts for each token as given; between ranks that share an expert it
        # gathers unequal numbers of tokens, which gloo does not.
        "moe_token_dispatcher_type": (
            "alltoall" if experts.choice == "tokens" and mesh.expert_tensor_parallel_size == 1 else "allgather"
        ),
        "expert_model_parallel_size": mesh.expert_parallel_size,
        "expert_tensor_parallel_size": mesh.expert_tensor_parallel_size,
    }
