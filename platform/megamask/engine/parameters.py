"""The one table of a rank's parameters, made from the layer family that built them.

Sharding, weight decay, expert groups and what is stored are decided here and read everywhere else: by the optimizer's
groups, the gradient norm, the state on disk and the initial weights. No decision depends on the letters of a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.engine.canonical import TensorSlice, layer_slices, replicated, vocabulary_slices
from megamask.engine.mesh import Mesh
from megamask.engine.multipliers import check_patterns, multiplier_of
from megamask.engine.specs.base import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, LayerPart, Part, expert_parameters
from megamask.models.shapes import EMBEDDING_NAME, FINAL_NORM_NAME, HEAD_NAME, TensorKind, layer_prefix
from megamask.models.spec import ModelSpec

_Stage = Sequence[tuple[int, Mapping[str, LayerPart]]]
"""Global number and parts of each layer of a stage."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# Kind of each part, and the dimension that the tensor-parallel ranks share out; None where each holds all of it.
_TRAITS: Mapping[Part, tuple[TensorKind, int | None]] = {
    Part.INPUT_NORM: (TensorKind.NORM, None),
    Part.QUERY_KEY_VALUE: (TensorKind.MATRIX, 0),
    Part.QUERY_KEY_VALUE_BIAS: (TensorKind.BIAS, 0),
    Part.QUERY_NORM: (TensorKind.NORM, None),
    Part.KEY_NORM: (TensorKind.NORM, None),
    Part.ATTENTION_OUTPUT: (TensorKind.RESIDUAL_MATRIX, 1),
    Part.POST_ATTENTION_NORM: (TensorKind.NORM, None),
    Part.GATE_AND_UP: (TensorKind.MATRIX, 0),
    Part.DOWN: (TensorKind.RESIDUAL_MATRIX, 1),
    Part.ROUTER: (TensorKind.MATRIX, None),
    Part.EXPERT_BIAS: (TensorKind.EXPERT_BIAS, None),
    Part.EXPERT_GATE_AND_UP: (TensorKind.MATRIX, 0),
    Part.EXPERT_DOWN: (TensorKind.RESIDUAL_MATRIX, 1),
    Part.SHARED_GATE_AND_UP: (TensorKind.MATRIX, 0),
    Part.SHARED_DOWN: (TensorKind.RESIDUAL_MATRIX, 1),
}


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """One parameter of this rank.

    Args:
        name: of the local parameter, as the network's `named_parameters` gives it.
        canonical: its row groups, as slices of canonical tensors; other rows are vocabulary padding, always zero.
        shape: of the local parameter.
        sharded_dim: dimension that the tensor-parallel ranks share out; None where each rank holds the same values.
        decays: whether weight decay applies.
        is_stored: whether this rank's copy goes into a checkpoint: replicas and a tied head's copy do not.
        is_expert: whether it belongs to the expert-parallel groups.
        is_buffer: whether it is a buffer, which no optimizer updates.
        lr_multiplier: factor on the step's learning rate.
    """

    name: str
    canonical: tuple[TensorSlice, ...]
    shape: tuple[int, ...]
    sharded_dim: int | None
    decays: bool
    is_stored: bool
    is_expert: bool = False
    is_buffer: bool = False
    lr_multiplier: float = 1.0

    @property
    def num_columns(self) -> int:
        """Elements of one row; 1 for a vector."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class ParameterTable:
    """The parameters of a rank by local name, in the network's order."""

    spec: ModelSpec
    infos: Mapping[str, ParameterInfo] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ParameterInfo:
        return self.infos[name]

    def __iter__(self) -> Iterator[ParameterInfo]:
        return iter(self.infos.values())


def parameter_table(
    chunks: Sequence[torch.nn.Module],
    spec: ModelSpec,
    mesh: Mesh,
    parts: Mapping[str, Part],
    optimizer: OptimizerConfig,
    *,
    are_experts_grouped: bool = False,
) -> ParameterTable:
    """Describe every parameter of a rank's network.

    Args:
        chunks: the rank's stages.
        parts: of a layer's parameters, from the family that built the layers; of a layer without experts.
        optimizer: which kinds of tensors decay.
        are_experts_grouped: whether the experts of a layer are parameters of one module (specs/experts.py).

    Raises:
        KeyError: the network has a parameter that the family does not describe.
        ValueError: a parameter's shape is not that of its slices, or the family describes one that is missing.
    """
    check_patterns(optimizer.multipliers(), spec)
    infos: dict[str, ParameterInfo] = {}
    for number, chunk in enumerate(chunks):
        layers, prefix = mesh.layers(spec.num_layers, number), _prefix(number, len(chunks))
        stage = [(layer, _layer_parts(layer, spec, mesh, parts, are_grouped=are_experts_grouped)) for layer in layers]
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            info = _info(name, tuple(tensor.shape), spec, mesh, stage, optimizer)
            infos[prefix + name] = replace(info, name=prefix + name)
        for local, (_, of_layer) in enumerate(stage):
            if missing := [name for name in of_layer if f"{prefix}decoder.layers.{local}.{name}" not in infos]:
                raise ValueError(f"layer {local} of this stage has no parameter {', '.join(missing)}")
    return ParameterTable(spec=spec, infos=MappingProxyType(infos))


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a rank's stages by the names of the table: with the stage's number where there are several."""
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            yield _prefix(number, len(chunks)) + name, parameter


def named_buffers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a rank's stages, named like the parameters."""
    for number, chunk in enumerate(chunks):
        for name, buffer in chunk.named_buffers():
            yield _prefix(number, len(chunks)) + name, buffer


def _layer_parts(
    layer: int, spec: ModelSpec, mesh: Mesh, dense: Mapping[str, Part], *, are_grouped: bool
) -> Mapping[str, LayerPart]:
    """Parts of a layer's parameters and buffers, by their names in the layer."""
    experts = spec.experts
    if experts is None or not spec.has_experts(layer):
        return dict(dense)
    parts: dict[str, LayerPart] = {name: part for name, part in dense.items() if part not in _DENSE}
    parts["mlp.router.weight"] = Part.ROUTER
    if experts.has_bias:
        parts["mlp.router.expert_bias"] = Part.EXPERT_BIAS
    for local, expert in enumerate(mesh.experts(experts.num_experts)):
        first, second = expert_parameters(local, are_grouped=are_grouped)
        parts[first], parts[second] = (Part.EXPERT_GATE_AND_UP, expert), (Part.EXPERT_DOWN, expert)
    if experts.num_shared:
        parts["mlp.shared_experts.linear_fc1.weight"] = Part.SHARED_GATE_AND_UP
        parts["mlp.shared_experts.linear_fc2.weight"] = Part.SHARED_DOWN
    return parts


_DENSE = {Part.GATE_AND_UP, Part.DOWN}


def _prefix(number: int, num_chunks: int) -> str:
    return "" if num_chunks == 1 else f"chunk{number}."


def mark_parameters(chunks: Sequence[torch.nn.Module], table: ParameterTable) -> None:
    """Set the attributes by which megatron-core finds shards (gradient norm) and experts (gradient sums, optimizers).

    Layer families set some of them themselves, not all, and not all in the same way.
    """
    for name, parameter in named_parameters(chunks):
        info = table[name]
        is_sharded = info.sharded_dim is not None
        for attribute, value in (
            ("tensor_model_parallel", is_sharded),
            ("partition_dim", info.sharded_dim if is_sharded else -1),
            ("partition_stride", 1),
        ):
            setattr(parameter, attribute, value)
        if info.is_expert:
            setattr(parameter, "allreduce", False)  # noqa: B010 - megatron-core's mark of expert parameters


def _info(
    name: str,
    shape: tuple[int, ...],
    spec: ModelSpec,
    mesh: Mesh,
    stage: _Stage,
    optimizer: OptimizerConfig,
) -> ParameterInfo:
    kind, sharded_dim, slices, is_expert = _describe(name, spec, mesh, stage)
    expected = _local_shape(kind, spec, mesh, slices)
    if shape != expected:
        raise ValueError(f"the parameter {name} has the shape {shape}; its canonical tensors make {expected}")
    is_tied_copy = name == OUTPUT_LAYER and spec.tie_embeddings
    return ParameterInfo(
        name=name,
        canonical=slices,
        shape=shape,
        sharded_dim=sharded_dim,
        decays=_decays(TensorKind.EMBEDDING if is_tied_copy else kind, optimizer),
        is_stored=not is_tied_copy
        and (sharded_dim is not None or mesh.tensor_parallel_rank == 0)
        and (
            # the optimizer shares out parameters over the data- and context-parallel ranks, not buffers
            kind is not TensorKind.EXPERT_BIAS or mesh.data_parallel_rank == mesh.context_parallel_rank == 0
        ),
        is_expert=is_expert,
        is_buffer=kind is TensorKind.EXPERT_BIAS,
        lr_multiplier=multiplier_of(name, slices or _first_slices(kind, spec), optimizer.multipliers()),
    )


def _first_slices(kind: TensorKind, spec: ModelSpec) -> tuple[TensorSlice, ...]:
    """The vocabulary's tensor, for a rank whose shard of it is padding alone."""
    is_own_head = kind is TensorKind.HEAD and not spec.tie_embeddings
    return replicated(HEAD_NAME if is_own_head else EMBEDDING_NAME, 1)


def _describe(
    name: str, spec: ModelSpec, mesh: Mesh, stage: _Stage
) -> tuple[TensorKind, int | None, tuple[TensorSlice, ...], bool]:
    """Kind, sharded dimension, slices, and whether it is an expert's."""
    if name == EMBEDDING:
        return TensorKind.EMBEDDING, 0, vocabulary_slices(spec, mesh, is_head=False), False
    if name == OUTPUT_LAYER:
        return TensorKind.HEAD, 0, vocabulary_slices(spec, mesh, is_head=True), False
    if name == FINAL_NORM:
        return TensorKind.NORM, None, replicated(FINAL_NORM_NAME, spec.hidden_size), False
    match = _LAYER.fullmatch(name)
    layer, parts = stage[int(match[1])] if match else (0, {})
    if match is None or match[2] not in parts:
        raise KeyError(f"the layer family does not describe the parameter {name}")
    part = parts[match[2]]
    is_expert = isinstance(part, tuple)
    kind, sharded_dim = _TRAITS[part[0] if isinstance(part, tuple) else part]
    return kind, sharded_dim, layer_slices(part, layer_prefix(layer), spec, mesh), is_expert


def _local_shape(kind: TensorKind, spec: ModelSpec, mesh: Mesh, slices: tuple[TensorSlice, ...]) -> tuple[int, ...]:
    if kind in (TensorKind.EMBEDDING, TensorKind.HEAD):
        return spec.padded_vocab_size // mesh.tensor_parallel_size, spec.hidden_size
    return sum(part.sizes[0] for part in slices), *slices[0].sizes[1:]


def _decays(kind: TensorKind, optimizer: OptimizerConfig) -> bool:
    return {
        TensorKind.NORM: optimizer.weight_decay_on_norms,
        TensorKind.BIAS: optimizer.weight_decay_on_biases,
        TensorKind.EMBEDDING: optimizer.weight_decay_on_embeddings,
    }.get(kind, True)
