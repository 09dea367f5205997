from __future__ import annotations

import pytest
import torch

from megamask.engine.step import StepShare
from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from megamask.models.counts import parameter_count
from support import engine_cases as cases
from support.engine_cases import OPTIONS, PLAIN


def test_layout_is_refused_when_other_processes_were_started(job):
    with pytest.raises(UsageError, match="= 2 processes, but 1 were started"):
        cases.make_engine(layout={"tensor_parallel_size": 2})


def test_collectives_of_one_process_answer_with_its_own_value(build):
    engine = build()
    assert engine.max_over_ranks(-3) == -3
    assert engine.broadcast_object({"a": [1]}) == {"a": [1]}
    assert engine.gather_objects("x") == ["x"]
    assert (engine.rank, engine.world_size, engine.is_main) == (0, 1, True)
    engine.barrier()


def test_members_are_all_places_in_one_process(build):
    assert build(micro_batch_size=2).members(8) == list(range(8))


@pytest.mark.promise("a step agrees on its counts and on its sums, norm and finiteness by one collective each")
def test_a_step_sums_over_all_ranks_twice(build, monkeypatch):
    engine = build(OPTIONS, micro_batch_size=2)
    sizes, reduce = [], torch.distributed.all_reduce

    def counted(tensor, *arguments, **options):
        sizes.append((tensor.dtype, tensor.numel()))
        return reduce(tensor, *arguments, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted)
    report = cases.take_step(engine, 1)
    assert [dtype for dtype, _ in sizes] == [torch.int64, torch.float64]
    assert report.is_finite and report.grad_norm > 0


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_value_that_is_not_finite_on_one_rank_stops_the_update(build, monkeypatch, broken):
    """Here the only rank; a sum over several is not finite either."""
    engine = build(PLAIN)
    before, optimizer = engine.parameter_digest(), engine._optimizer
    norm, losses = optimizer.squared_gradient_norm, StepShare.forward_backward
    if broken == "gradient":
        monkeypatch.setattr(optimizer, "squared_gradient_norm", lambda: norm() + torch.inf)
    else:
        monkeypatch.setattr(StepShare, "forward_backward", lambda *arguments: losses(*arguments) + torch.nan)
    report = cases.take_step(engine, 1)
    assert not report.is_finite
    assert engine.parameter_digest() == before


def test_parameter_digest_tells_one_changed_bit(build):
    engine = build()
    before = engine.parameter_digest()
    assert before == engine.parameter_digest()
    parameter = next(engine._rank_model.network.parameters())
    with torch.no_grad():
        parameter.view(-1)[3] = torch.nextafter(parameter.view(-1)[3], torch.tensor(1.0))
    assert engine.parameter_digest() != before


@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
def test_built_network_has_the_counted_parameters_and_initial_weights(build, spec):
    """Up to the padding of the vocabulary, which the count leaves out."""
    engine = build(spec)
    network = engine._rank_model.network
    padding = (spec.padded_vocab_size - spec.vocab_size) * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameter_count(spec) + padding
    expected = dict(cases.reference(spec).named_parameters())
    for name, parameter in network.named_parameters():
        for block in engine.parameters[name].canonical:
            rows = parameter[block.first_row : block.first_row + block.sizes[0]]
            assert torch.equal(rows, expected[block.name][block.index]), name


@pytest.mark.parametrize("kind", [StorageError, CheckpointIntegrityError])
def test_a_failure_is_raised_as_it_is_on_the_rank_that_has_it(build, kind):
    collectives = build()._collectives
    collectives.raise_alike([], kind)
    with pytest.raises(OSError, match="full"):
        collectives.raise_alike([OSError("full")], kind)
