"""The parameter table: slices, shards and decay follow from the layer family, not from the letters of a name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import pytest
import torch

from megamask.config.schema.optimizer import OptimizerConfig
from megamask.engine.canonical import layer_slices
from megamask.engine.mesh import Mesh
from megamask.engine.parameters import ParameterTable, mark_parameters, parameter_table
from megamask.engine.specs.base import EMBEDDING, FINAL_NORM, OUTPUT_LAYER, Part
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from support.engine_cases import OPTIONS, PLAIN

# Names under which other families hold the same parts: norms fused into the linear module, and a norm without the word.
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": Part.INPUT_NORM,
    "self_attention.linear_qkv.weight": Part.QUERY_KEY_VALUE,
    "self_attention.linear_proj.weight": Part.ATTENTION_OUTPUT,
    "mlp.linear_fc1.layer_norm_weight": Part.POST_ATTENTION_NORM,
    "mlp.linear_fc1.weight": Part.GATE_AND_UP,
    "mlp.linear_fc2.weight": Part.DOWN,
}
OPTIONAL = {
    "self_attention.linear_qkv.bias": Part.QUERY_KEY_VALUE_BIAS,
    "self_attention.q_scale": Part.QUERY_NORM,
    "self_attention.k_scale": Part.KEY_NORM,
}


def parts_of(spec: ModelSpec) -> dict[str, Part]:
    return FUSED | (OPTIONAL if spec.qkv_bias else {})


class Network(torch.nn.Module):
    """Parameters with the names and shapes of a stage, without any layers."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, parts: Mapping[str, Part]) -> None:
        super().__init__()
        vocabulary = (spec.padded_vocab_size // mesh.tensor_parallel_size, spec.hidden_size)
        shapes = {EMBEDDING: vocabulary} if mesh.is_first_stage else {}
        for layer in range(len(mesh.layers(spec.num_layers))):
            for name, part in parts.items():
                slices = layer_slices(part, "", spec, mesh)
                rows = sum(piece.sizes[0] for piece in slices)
                shapes[f"decoder.layers.{layer}.{name}"] = (rows, *slices[0].sizes[1:])
        if mesh.is_last_stage:
            shapes[FINAL_NORM] = (spec.hidden_size,)
            if not spec.tie_embeddings or not mesh.is_first_stage:
                shapes[OUTPUT_LAYER] = vocabulary
        self.held = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.held.items()


def table_of(spec: ModelSpec, mesh: Mesh, **decay: bool) -> ParameterTable:
    parts = parts_of(spec)
    return parameter_table([Network(spec, mesh, parts)], spec, mesh, parts, OptimizerConfig(learning_rate=1.0, **decay))


@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
def test_stored_slices_are_every_element_exactly_once(spec, tp, pp):
    counts = {name: torch.zeros(shape) for name, shape in canonical_shapes(spec).items()}
    for rank in range(tp * pp):
        mesh = Mesh(rank=rank, tensor_parallel_size=tp, pipeline_parallel_size=pp)
        for info in table_of(spec, mesh):
            for piece in info.canonical if info.is_stored else ():
                counts[piece.name][piece.index] += 1
    for name, count in counts.items():
        assert bool((count == 1).all()), name


def test_queries_keys_and_values_are_stacked_by_group():
    """megatron-core's fused projection: [queries of group g, key g, value g] for each group of this rank."""
    spec = dataclasses.replace(PLAIN, num_attention_heads=8, num_query_groups=4, head_dim=2)
    table = table_of(spec, Mesh(rank=1, tensor_parallel_size=2))
    found = [
        (re.search(r"(.)_proj", piece.name)[1], piece.first_row, piece.offsets[0], piece.sizes)
        for piece in table["decoder.layers.1.self_attention.linear_qkv.weight"].canonical
    ]
    assert found == [
        ("q", 0, 8, (4, 32)),
        ("k", 4, 4, (2, 32)),
        ("v", 6, 4, (2, 32)),
        ("q", 8, 12, (4, 32)),
        ("k", 12, 6, (2, 32)),
        ("v", 14, 6, (2, 32)),
    ]


def test_a_shard_of_padding_alone_has_no_slices():
    assert table_of(OPTIONS, Mesh(rank=1, tensor_parallel_size=2))[EMBEDDING].canonical == ()


@pytest.mark.promise("shards, weight decay and experts follow from the layer family, never from the letters of a name")
def test_norms_are_whole_and_do_not_decay_under_any_name():
    """Fused into a linear module, or without the word: "layernorm" in the name would call them sharded matrices."""
    table = table_of(OPTIONS, Mesh(rank=1, tensor_parallel_size=2))
    prefix = "decoder.layers.0."
    norms = [name for name, part in parts_of(OPTIONS).items() if part.name.endswith("NORM")]
    assert len(norms) == 4
    for name in norms:
        info = table[prefix + name]
        assert (info.sharded_dim, info.decays, info.is_stored) == (None, False, False), name
    for name, sharded_dim in (("self_attention.linear_qkv.weight", 0), ("mlp.linear_fc2.weight", 1)):
        info = table[prefix + name]
        assert (info.sharded_dim, info.decays, info.is_stored) == (sharded_dim, True, True), name


@pytest.mark.promise("shards, weight decay and experts follow from the layer family, never from the letters of a name")
def test_marks_for_megatron_core_are_the_tables_whatever_a_layer_set_before():
    mesh = Mesh(rank=0, tensor_parallel_size=2)
    network = Network(OPTIONS, mesh, parts_of(OPTIONS))
    for parameter in network.held.values():
        parameter.partition_stride = 7
        parameter.tensor_model_parallel = True
    table = table_of(OPTIONS, mesh)
    expert = "decoder.layers.0.mlp.linear_fc2.weight"
    infos = {info.name: dataclasses.replace(info, is_expert=info.name == expert) for info in table}
    mark_parameters([network], dataclasses.replace(table, infos=infos))
    for name, parameter in network.named_parameters():
        sharded_dim = table[name].sharded_dim
        assert parameter.tensor_model_parallel == (sharded_dim is not None)
        assert (parameter.partition_dim, parameter.partition_stride) == (-1 if sharded_dim is None else sharded_dim, 1)
        assert getattr(parameter, "allreduce", True) == (name != expert)


@pytest.mark.parametrize("decays", [True, False])
def test_a_tied_heads_copy_decays_as_the_embedding_and_is_not_stored(decays):
    mesh = Mesh(rank=1, pipeline_parallel_size=2)
    info = table_of(OPTIONS, mesh, weight_decay_on_embeddings=decays)[OUTPUT_LAYER]
    assert (info.decays, info.is_stored) == (decays, False)
    assert table_of(PLAIN, mesh, weight_decay_on_embeddings=decays)[OUTPUT_LAYER].decays


def test_network_that_its_family_does_not_describe_is_refused():
    mesh, optimizer = Mesh(rank=0), OptimizerConfig(learning_rate=1.0)
    network = Network(PLAIN, mesh, FUSED)
    some = {name: part for name, part in FUSED.items() if part is not Part.DOWN}
    with pytest.raises(KeyError, match=r"does not describe .*layers\.0\.mlp\.linear_fc2\.weight"):
        parameter_table([network], PLAIN, mesh, some, optimizer)
    with pytest.raises(ValueError, match=r"layer 0 .* no parameter self_attention\.linear_qkv\.bias"):
        parameter_table([network], PLAIN, mesh, FUSED | OPTIONAL, optimizer)
    wrong = FUSED | {"mlp.linear_fc1.weight": Part.DOWN}
    with pytest.raises(ValueError, match=r"linear_fc1\.weight has the shape \(96, 32\).*\(32, 48\)"):
        parameter_table([network], PLAIN, mesh, wrong, optimizer)
