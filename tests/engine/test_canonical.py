from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from megamask.engine.canonical import CanonicalMap
from megamask.engine.topology import Topology
from megamask.models.initial_weights import canonical_shapes
from support.engine_cases import OPTIONS, PLAIN

LAYER = ["input_layernorm", "pre_mlp_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj"]
LAYER += ["mlp.linear_fc1", "mlp.linear_fc2"]


def parameters(spec, topology):
    """megatron-core's names on one rank."""
    layers = range(len(topology.layers(spec.num_layers)))
    names = [f"decoder.layers.{layer}.{name}.weight" for layer in layers for name in LAYER]
    if spec.qkv_bias:
        names += [f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in layers]
    if spec.qk_norm:
        names += [f"decoder.layers.{layer}.self_attention.{x}_layernorm.weight" for layer in layers for x in "qk"]
    if topology.is_first_stage:
        names.append("embedding.word_embeddings.weight")
    if topology.is_last_stage:
        names.append("decoder.final_layernorm.weight")
        if not spec.tie_embeddings or not topology.is_first_stage:
            names.append("output_layer.weight")
    return names


@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
def test_owned_blocks_are_every_element_exactly_once(spec, tp, pp):
    counts = {name: torch.zeros(shape) for name, shape in canonical_shapes(spec).items()}
    for rank in range(tp * pp):
        topology = Topology(rank=rank, tensor_parallel_size=tp, data_parallel_size=1, pipeline_parallel_size=pp)
        canonical = CanonicalMap(spec=spec, topology=topology)
        for parameter in parameters(spec, topology):
            for block in canonical.blocks(parameter):
                if canonical.is_owner(parameter):
                    counts[block.name][block.index] += 1
    for name, count in counts.items():
        assert bool((count == 1).all()), name


def test_queries_keys_and_values_are_stacked_by_group():
    """The layout of MEGATRON's fused projection: [queries of group g, key g, value g] for each group of this rank."""
    topology = Topology(rank=1, tensor_parallel_size=2, data_parallel_size=1, pipeline_parallel_size=1)
    spec = dataclasses.replace(PLAIN, num_attention_heads=8, num_query_groups=4, head_dim=2)
    blocks = CanonicalMap(spec=spec, topology=topology).blocks("decoder.layers.1.self_attention.linear_qkv.weight")
    found = [
        (re.search(r"(.)_proj", block.name)[1], block.first_row, block.offsets[0], block.sizes) for block in blocks
    ]
    assert found == [
        ("q", 0, 8, (4, 32)),
        ("k", 4, 4, (2, 32)),
        ("v", 6, 4, (2, 32)),
        ("q", 8, 12, (4, 32)),
        ("k", 12, 6, (2, 32)),
        ("v", 14, 6, (2, 32)),
    ]


def test_a_shard_of_padding_alone_has_no_blocks():
    topology = Topology(rank=1, tensor_parallel_size=2, data_parallel_size=1, pipeline_parallel_size=1)
    assert CanonicalMap(spec=OPTIONS, topology=topology).blocks("embedding.word_embeddings.weight") == []


@pytest.mark.parametrize("name", ["mtp.weight", "decoder.layers.0.mlp.router.weight"])
def test_an_unknown_parameter_is_refused(name):
    topology = Topology(rank=0, tensor_parallel_size=1, data_parallel_size=1, pipeline_parallel_size=1)
    with pytest.raises(KeyError, match=re.escape(name.split("layers.0.")[-1])):
        CanonicalMap(spec=PLAIN, topology=topology).blocks(name)
