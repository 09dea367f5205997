"""Every optimizer that megatron-core chains is initialised, updated, clipped and saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megamask.engine import engine as engine_module
from megamask.engine.optimizer import norm_of
from megamask.engine.parameters import parameter_table
from support import engine_cases as cases

pytestmark = pytest.mark.multiprocess


def change_table(monkeypatch, change):
    """Engines built from now on use a changed parameter table."""

    def changed(*arguments, **settings):
        table = parameter_table(*arguments, **settings)
        infos = {info.name: dataclasses.replace(info, **change(info)) for info in table}
        return dataclasses.replace(table, infos=infos)

    monkeypatch.setattr(engine_module, "parameter_table", changed)


def trained(engine, steps=3):
    """Reports and weights after some steps that clip and decay."""
    reports = [cases.report_fields(cases.take_step(engine, step)) for step in range(1, steps + 1)]
    return reports, {name: weight.clone() for name, weight in cases.canonical_weights(engine).items()}


@pytest.mark.promise("parameters of a second optimizer (experts) start, train, clip, save and load as the others")
def test_experts_own_optimizer_does_what_the_first_one_does(build, monkeypatch, tmp_path):
    settings = {"clip_grad_norm": 0.05, "weight_decay": 0.5}
    plain = build(**settings)
    expected = trained(plain)
    change_table(monkeypatch, lambda info: {"is_expert": ".mlp." in info.name})
    engine = build(**settings)
    assert len(engine._optimizer._optimizer.chained_optimizers) == 2
    assert {shard.info.name for shard in engine._optimizer.shards()} == {info.name for info in engine.parameters}
    reports, weights = trained(engine)
    for one, two in zip(reports, expected[0], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[1][name], rtol=1e-4, atol=1e-5)

    cases.save_state(engine, tmp_path)
    again = build(**settings)
    again.load_state(tmp_path)
    assert again._optimizer.num_updates == 3
    assert again.parameter_digest() == engine.parameter_digest()
    assert cases.report_fields(cases.take_step(again, 4)) == cases.report_fields(cases.take_step(engine, 4))
    assert again.parameter_digest() == engine.parameter_digest()


def test_learning_rate_factor_of_the_table_reaches_the_update(build, monkeypatch):
    """With zero gradients an update is the decay alone: w -> (1 - factor * rate * decay) * w."""
    change_table(monkeypatch, lambda info: {"lr_multiplier": 0.5 if ".mlp." in info.name else 1.0})
    engine = build(weight_decay=0.5)
    weights = dict(engine._rank_model.network.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(2.0)
    engine._optimizer.zero_gradients()
    engine._optimizer.update(learning_rate=0.5, gradient_norm=norm_of(float(engine._optimizer.squared_gradient_norm())))
    for name, weight in weights.items():
        wanted = 1.75 if ".mlp." in name else 1.5 if engine.parameters[name].decays else 2.0
        assert torch.equal(weight, torch.full_like(weight, wanted)), name
