"""A pass runs the model chunk that the pipeline schedule hands to it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.engine import passes
from megamask.engine.passes import PassInput
from megamask.models.context import Context

LAYOUT = {"shape": (1, 4)}


@dataclasses.dataclass
class Chunk:
    """A model chunk that adds a number of its own to what it gets; the last one has the loss."""

    addend: int
    pre_process: bool
    post_process: bool

    @property
    def module(self) -> Chunk:
        return self

    def encode(self, inputs: torch.Tensor | None, context: Context, part: None) -> torch.Tensor:
        assert (inputs is not None) == self.pre_process
        before = torch.zeros(1) if inputs is None else inputs.sum().reshape(1).float()
        return before + self.addend


FIRST = Chunk(addend=100, pre_process=True, post_process=False)
LAST = Chunk(addend=1000, pre_process=False, post_process=True)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Outputs of a schedule with two chunks of one rank, each running every micro-batch, as virtual stages do."""
    found: list[Any] = []

    def schedule(
        *, forward_step_func: Any, data_iterator: Any, model: Any, num_microbatches: int, **unused: Any
    ) -> None:
        for chunk, micro_batches in zip(model, data_iterator, strict=True):
            for _ in range(num_microbatches):
                output, loss = forward_step_func(micro_batches, chunk)
                found.append((chunk.addend, output, loss))

    monkeypatch.setattr(passes, "get_forward_backward_func", lambda: schedule)
    return found


def rank_model() -> Any:
    """A rank with two virtual stages, the complete sequence and no experts."""
    backend = SimpleNamespace(device=torch.device("cpu"))
    mesh = SimpleNamespace(pipeline_parallel_size=2)
    return SimpleNamespace(
        chunks=(FIRST, LAST), mesh=mesh, backend=backend, routing=None, part=lambda num_positions: None
    )


@pytest.mark.promise("a pass through the pipeline runs the model chunk that the schedule names, not always the first")
def test_pass_runs_the_chunk_that_it_is_given(outputs: list[Any]) -> None:
    seen: list[tuple[int, float, int]] = []

    def look(network: Any, hidden: torch.Tensor, number: int) -> torch.Tensor:
        seen.append((network.addend, hidden.item(), number))
        return hidden

    micro_batches = [PassInput(inputs=torch.full((1, 4), number), context=Context()) for number in (1, 2)]
    answers = passes.forward_only(rank_model(), micro_batches, look, **LAYOUT)
    # The first chunk embeds the ids and has no loss; the last one gets no ids and is the only one that is looked at.
    assert [(chunk, output.item()) for chunk, output, _ in outputs] == [
        (100, 104),
        (100, 108),
        (1000, 1000),
        (1000, 1000),
    ]
    assert seen == [(1000, 1000.0, 0), (1000, 1000.0, 1)]
    assert [answer.item() for answer in answers] == [1000.0, 1000.0]

    seen.clear()
    outputs.clear()
    passes.train(rank_model(), micro_batches, look, **LAYOUT)
    assert [chunk for chunk, _, _ in outputs] == [100, 100, 1000, 1000]
    assert [(network, number) for network, _, number in seen] == [(1000, 0), (1000, 1)]
