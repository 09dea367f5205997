"""A network with experts on one process: loss and gradients of the reference network, bias, counts and state."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.models.experts import ExpertSpec
from megamask.models.reference import ExpertFeedForward, ReferenceModel
from support import engine_cases as cases
from support.layout_worker import SPECS

EXPERTS = ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=24)
KINDS = {
    "softmax": dataclasses.replace(cases.PLAIN, experts=dataclasses.replace(EXPERTS, normalizes=False)),
    "sigmoid": SPECS["experts"],
    "expert_choice": dataclasses.replace(cases.PLAIN, experts=dataclasses.replace(EXPERTS, choice="experts")),
}


def with_balance(model: ReferenceModel) -> list[torch.Tensor]:
    """The balance losses of the layers, filled while the model runs."""
    found: list[torch.Tensor] = []
    experts = model.spec.experts
    assert experts is not None

    def note(module: ExpertFeedForward, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        _, scores, is_chosen = module.route(arguments[0])
        share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
        frequency = is_chosen.float().mean(dim=1) * experts.num_experts / experts.topk
        found.append(experts.balance_weight * (share * frequency).sum() / (2 * cases.GLOBAL_BATCH_SIZE))

    for module in model.modules():
        if isinstance(module, ExpertFeedForward):
            module.register_forward_hook(note)
    return found


@pytest.mark.promise("a network with experts has the loss and the gradients of the reference network")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_reference_networks(build, kind):
    spec = KINDS[kind]
    engine, model = build(spec, micro_batch_size=2, clip_grad_norm=0.0), cases.reference(spec)
    report = cases.take_step(engine, 1, 0.0)
    balance = with_balance(model)
    loss = cases.reference_loss(model, 1, cases.objective())
    loss = loss + (torch.stack(balance).sum() if balance else 0.0)
    loss.backward()
    assert report.loss == pytest.approx(float(loss), rel=1e-6)
    gradients = cases.canonical_gradients(engine)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


def test_counts_are_those_of_the_step_and_the_bias_follows_them(build):
    spec = SPECS["experts"]
    engine = build(spec, micro_batch_size=2)
    report = cases.take_step(engine, 1)
    tokens = 2 * cases.GLOBAL_BATCH_SIZE * cases.SEQUENCE_LENGTH  # both views
    assert [sum(layer) for layer in report.expert_counts] == [0, spec.experts.topk * tokens]
    [(_, bias)] = engine._rank_model.network.named_buffers()
    expected = torch.tensor(report.expert_counts[1])
    assert torch.equal(torch.sign(bias), torch.sign(expected.sum() - 8 * expected).float())
    assert float(bias.abs().max()) == pytest.approx(spec.experts.bias_rate)
    before = bias.clone()
    cases.masked_scores(engine, *cases.probe_rows(3, spec))
    assert torch.equal(bias, before), "scoring moves nothing"
    assert int(engine._rank_model.routing.counts.sum()) == spec.experts.topk * tokens


@pytest.mark.promise("the state has the router's bias, and a resumed run is bit-identical")
def test_state_holds_the_bias(build, tmp_path):
    from megamask.engine.state.restore import read_canonical_weights

    spec = SPECS["experts"]
    engine = build(spec, micro_batch_size=2)
    for step in (1, 2):
        cases.take_step(engine, step)
    cases.save_state(engine, tmp_path)
    [(_, bias)] = engine._rank_model.network.named_buffers()
    weights = read_canonical_weights(tmp_path, spec)
    assert torch.equal(weights["model.layers.1.mlp.gate.expert_bias"], bias)
    model = ReferenceModel(spec)
    model.load_state_dict(weights)
    again = build(spec, micro_batch_size=2)
    again.load_state(tmp_path)
    assert again.parameter_digest() == engine.parameter_digest()
    one, two = (cases.report_fields(cases.take_step(each, 3)) for each in (engine, again))
    assert one == two


def test_balance_of_micro_batches_is_that_of_their_rows_together_and_depends_on_them(build):
    """A micro-batch of one row has the same loss either way; one of several rows another one."""
    spec = dataclasses.replace(SPECS["experts"], experts=dataclasses.replace(SPECS["experts"].experts, has_bias=False))
    single = cases.objective(complementary=False)

    def balance(size: int, over: str) -> float:
        engine = build(spec, micro_batch_size=size, goal=single, balance_over=over)
        report = cases.take_step(engine, 1, 0.0)
        return report.loss - report.loss_terms["nelbo"]

    by_rows = balance(1, "row")
    assert balance(1, "micro_batch") == by_rows
    assert balance(4, "row") == pytest.approx(by_rows, rel=1e-4)
    assert balance(4, "micro_batch") != pytest.approx(by_rows, rel=1e-4)
