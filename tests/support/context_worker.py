"""Hidden states under each positions-and-pattern case, on one layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamask.models.context import BlockPattern, Causal, Context
from support import engine_cases as cases

NUM_ROWS, LENGTH = 2, 16
_POSITIONS = torch.tensor([list(range(LENGTH)), [*range(5), *range(LENGTH - 5)]])
_DOCUMENTS = torch.tensor([[0] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])
_TWICE = torch.arange(LENGTH // 2).repeat(2).expand(NUM_ROWS, LENGTH)
CONTEXTS = {
    "bidirectional": Context(),
    "causal": Context(pattern=Causal()),
    "documents": Context(positions=_POSITIONS, documents=_DOCUMENTS),
    "causal documents": Context(pattern=Causal(), positions=_POSITIONS, documents=_DOCUMENTS),
    "blocks": Context(pattern=BlockPattern(block_size=4), positions=_TWICE),
}
LAYOUTS = [
    {"tensor_parallel_size": 2},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_parallel_size": 2},
]


def inputs() -> torch.Tensor:
    return torch.randint(0, 58, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(5))


def run_layouts(root: str) -> list[None]:
    """Every context on every layout; the last rank holds the last stage and writes the hidden states."""
    for number, layout in enumerate(LAYOUTS):
        engine = cases.make_engine(cases.OPTIONS, layout)
        found = {name: hidden_states(engine, context) for name, context in CONTEXTS.items()}
        if engine.rank == engine.world_size - 1:
            torch.save(found, Path(root) / f"{number}.pt")
        engine.close()
    return []


@torch.no_grad()
def hidden_states(engine: Any, context: Context) -> torch.Tensor | None:
    """[b, s, h] on the last stage, None elsewhere; collective."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs: list[torch.Tensor] = []

    def forward_step(data: Any, model: Any) -> Any:
        return engine._rank_model.network.encode(next(data), context), keep

    def keep(hidden: torch.Tensor) -> Any:
        outputs.append(hidden)
        return hidden.sum(), torch.tensor(1, dtype=torch.int), {}

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([inputs()]),
        model=list(engine._rank_model.chunks),
        num_microbatches=1,
        seq_length=LENGTH,
        micro_batch_size=NUM_ROWS,
        forward_only=True,
    )
    return outputs[0].transpose(0, 1).clone() if outputs else None
