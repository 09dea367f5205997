#!/usr/bin/env python3
"""Build one rank of any job with megatron-core on torch's meta device, under a process group without peers.

    tools/meta_rank.py < cases.json    # {"cases": [{spec, layout, world_size, rank, compute}]}: one JSON object a line
    tools/meta_rank.py --table         # seconds and groups of rank 0 as the job grows to 16,384 ranks, Markdown

Nothing is computed and no memory is taken: the sizes are what the planner's arithmetic is compared with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megamask.engine.engine  # noqa: F401  prepares torch for megatron-core
from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.engine.backend import select_backend
from megamask.engine.layers.router import Routing
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import build_network, wrap_data_parallel
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.parameters import mark_parameters, parameter_table
from megamask.engine.specs.families import layer_family
from megamask.models.spec import ModelSpec


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Parameters of one rank, bytes of its buffers, elements of its optimizer's state, and seconds to build them."""
    spec, layout = ModelSpec.from_json(case["spec"]), LayoutConfig(**case["layout"])
    world_size, precision = case["world_size"], PrecisionConfig(compute=case["compute"])
    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=world_size)
    started, backend = time.perf_counter(), select_backend()
    try:
        mesh = Mesh.from_layout(layout, rank=case["rank"], world_size=world_size)
        groups = ProcessGroups(mesh)
        grouped = time.perf_counter()
        torch.cuda.current_device = lambda: torch.device("meta")
        family = layer_family("local", backend)
        routing = None
        if spec.experts is not None:
            backend.prepare_experts()
            group = groups.tensor_and_context
            routing = Routing(spec.experts, spec.num_layers, row_group=group, device=torch.device("meta"))
        with torch.device("meta"):
            networks = [
                build_network(spec, mesh, precision, mask_token_id=0, family=family, chunk=chunk, routing=routing)
                for chunk in range(mesh.virtual_pipeline_size)
            ]
            optimizer_config = OptimizerConfig(learning_rate=1.0)
            table = parameter_table(networks, spec, mesh, family.layer_parameters(spec), optimizer_config)
            mark_parameters(networks, table)
            chunks = [
                wrap_data_parallel(network, DeviceConfig(), chunk=chunk) for chunk, network in enumerate(networks)
            ]
            optimizer = ShardedAdamW(chunks, table, optimizer_config)
            updated = sum(shard.stop - shard.start for shard in optimizer.shards() if not shard.info.is_buffer)
        buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return {
            "count": sum(parameter.numel() for network in networks for parameter in network.parameters()),
            "parameters": sum(buffer.param_data.numel() * buffer.param_data.element_size() for buffer in buffers),
            "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
            "updated": updated,
            "groups_s": grouped - started,
            "build_s": time.perf_counter() - grouped,
        }
    finally:
        ProcessGroups.release()
        dist.destroy_process_group()


def table() -> Iterator[str]:
    """A dense 100B network on growing jobs, 64 ranks a replica."""
    spec = ModelSpec(
        num_layers=88,
        hidden_size=10240,
        ffn_hidden_size=28672,
        num_attention_heads=80,
        num_query_groups=8,
        head_dim=128,
        qk_norm=False,
        qkv_bias=False,
        tie_embeddings=False,
        rope_theta=500000.0,
        norm_eps=1e-5,
        init_std=0.02,
        vocab_size=128_256,
        padded_vocab_size=128_256,
        max_sequence_length=4096,
    )
    yield "| ranks | seconds for groups | seconds for network and optimizer | optimizer's elements |"
    yield "|---:|---:|---:|---:|"
    for replicas in (1, 4, 16, 64, 256):
        layout = {"tensor_parallel_size": 8, "pipeline_parallel_size": 8, "data_parallel_size": replicas}
        case = {"spec": spec.to_json(), "layout": layout | {"sequence_parallel": True}, "rank": 0, "compute": "bf16"}
        found = measure(case | {"world_size": 64 * replicas})
        yield f"| {64 * replicas:,} | {found['groups_s']:.2f} | {found['build_s']:.2f} | {found['updated']:,} |"


if __name__ == "__main__":
    if "--table" in sys.argv[1:]:
        for line in table():
            print(line, flush=True)
    else:
        for case in json.load(sys.stdin)["cases"]:
            print(json.dumps(measure(case)), flush=True)
