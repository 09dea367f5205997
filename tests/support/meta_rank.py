"""One rank of any job, built by megatron-core on torch's meta device under a process group without peers.

    python meta_rank.py        # reads {"cases": [...]} from stdin, prints one JSON object a line

Nothing is computed: the buffers' sizes are what the planner's arithmetic is compared with.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megamask.engine.engine  # noqa: F401  prepares torch for megatron-core
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.engine.backend import select_backend
from megamask.engine.mesh import Mesh, ProcessGroups
from megamask.engine.network import build_network, wrap_data_parallel
from megamask.engine.optimizer import ShardedAdamW
from megamask.engine.parameters import mark_parameters, parameter_table
from megamask.engine.specs.families import layer_family
from megamask.models.spec import ModelSpec


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Elements of the buffers and of the optimizer's state of one rank."""
    spec, layout = ModelSpec.from_json(case["spec"]), LayoutConfig(**case["layout"])
    world_size, compute = case["world_size"], {"fp32": torch.float32, "bf16": torch.bfloat16}[case["compute"]]
    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=world_size)
    try:
        mesh = Mesh.from_layout(layout, rank=case["rank"], world_size=world_size)
        groups = ProcessGroups(mesh)
        torch.cuda.current_device = lambda: torch.device("meta")
        family = layer_family("local", select_backend())
        with torch.device("meta"):
            network = build_network(spec, mesh, compute, mask_token_id=0, family=family)
            table = parameter_table(network, spec, mesh, family.layer_parameters(spec), OptimizerConfig(learning_rate=1.0))
            mark_parameters(network, table)
            model = wrap_data_parallel(network)
            optimizer = ShardedAdamW(model, table, OptimizerConfig(learning_rate=1.0))
            updated = sum(shard.stop - shard.start for shard in optimizer.shards())
        buffers = [*model.buffers, *model.expert_parallel_buffers]
        return {
            "count": sum(parameter.numel() for parameter in network.parameters()),
            "parameters": sum(buffer.param_data.numel() * buffer.param_data.element_size() for buffer in buffers),
            "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
            "updated": updated,
        }
    finally:
        ProcessGroups.release()
        dist.destroy_process_group()


if __name__ == "__main__":
    for case in json.load(sys.stdin)["cases"]:
        print(json.dumps(measure(case)), flush=True)
