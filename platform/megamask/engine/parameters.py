"""The one table of a rank's parameters, made from the layer family that built them.

Sharding, weight decay, expert groups and what is stored are decided here and read everywhere else: by the optimizer's
groups, the gradient norm, the state on disk and the initial weights. No decision depends on the letters of a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.engine.canonical import TensorSlice, layer_slices, replicated, vocabulary_slices
from megamask.engine.mesh import Mesh
from megamask.engine.specs.base import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, Part
from megamask.models.shapes import FINAL_NORM_NAME, TensorKind, layer_prefix
from megamask.models.spec import ModelSpec

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
        lr_multiplier: factor on the step's learning rate.
    """

    name: str
    canonical: tuple[TensorSlice, ...]
    shape: tuple[int, ...]
    sharded_dim: int | None
    decays: bool
    is_stored: bool
    is_expert: bool = False
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
    network: torch.nn.Module, spec: ModelSpec, mesh: Mesh, parts: Mapping[str, Part], optimizer: OptimizerConfig
) -> ParameterTable:
    """Describe every parameter of a rank's network.

    Args:
        parts: of a layer's parameters, from the family that built the layers.
        optimizer: which kinds of tensors decay.

    Raises:
        KeyError: the network has a parameter that the family does not describe.
        ValueError: a parameter's shape is not that of its slices, or the family describes one that is missing.
    """
    infos = {name: _info(name, tuple(p.shape), spec, mesh, parts, optimizer) for name, p in network.named_parameters()}
    for layer in range(len(mesh.layers(spec.num_layers))):
        if missing := [name for name in parts if f"decoder.layers.{layer}.{name}" not in infos]:
            raise ValueError(f"layer {layer} of this stage has no parameter {', '.join(missing)}")
    return ParameterTable(spec=spec, infos=MappingProxyType(infos))


def mark_parameters(network: torch.nn.Module, table: ParameterTable) -> None:
    """Set the attributes by which megatron-core finds shards (gradient norm) and experts (gradient sums, optimizers).

    Layer families set some of them themselves, not all, and not all in the same way.
    """
    for name, parameter in network.named_parameters():
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
    parts: Mapping[str, Part],
    optimizer: OptimizerConfig,
) -> ParameterInfo:
    kind, sharded_dim, slices = _describe(name, spec, mesh, parts)
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
        is_stored=not is_tied_copy and (sharded_dim is not None or mesh.tensor_parallel_rank == 0),
    )


def _describe(
    name: str, spec: ModelSpec, mesh: Mesh, parts: Mapping[str, Part]
) -> tuple[TensorKind, int | None, tuple[TensorSlice, ...]]:
    """Kind, sharded dimension and slices."""
    if name == EMBEDDING:
        return TensorKind.EMBEDDING, 0, vocabulary_slices(spec, mesh, is_head=False)
    if name == OUTPUT_LAYER:
        return TensorKind.HEAD, 0, vocabulary_slices(spec, mesh, is_head=True)
    if name == FINAL_NORM:
        return TensorKind.NORM, None, replicated(FINAL_NORM_NAME, spec.hidden_size)
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in parts:
        raise KeyError(f"the layer family does not describe the parameter {name}")
    layer = mesh.layers(spec.num_layers)[int(match[1])]
    kind, sharded_dim = _TRAITS[parts[match[2]]]
    return kind, sharded_dim, layer_slices(parts[match[2]], layer_prefix(layer), spec, mesh)


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
