from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megamask.engine.optimizer import norm_of
from support import engine_cases as cases
from support.engine_cases import OPTIONS, PLAIN


@pytest.mark.promise("loss and gradients equal those of the reference network")
@pytest.mark.promise("loss terms and gradients with the z-loss equal the reference network's")
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("goal", [cases.objective(), cases.objective(complementary=False, mask_logit="included")])
def test_loss_and_gradients_equal_the_reference_networks(build, spec, goal, z_loss_weight):
    engine = build(spec, goal=goal, micro_batch_size=2, clip_grad_norm=0.0, z_loss_weight=z_loss_weight)
    report = cases.take_step(engine, 1, learning_rate=0.0)

    model = cases.reference(spec)
    nelbo, z_loss = cases.reference_loss(model, 1, goal), z_loss_weight * cases.reference_z_loss(model, 1, goal)
    (nelbo + z_loss).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = cases.canonical_gradients(engine)

    terms = {"nelbo": nelbo.item()} | ({"z_loss": z_loss.item()} if z_loss_weight else {})
    assert report.loss_terms == pytest.approx(terms, rel=1e-5)
    assert report.loss == sum(report.loss_terms.values())
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)


def test_counts_are_those_of_the_noise_law(build):
    engine = build()
    report = cases.take_step(engine, 3)
    share = cases.batch(list(range(cases.GLOBAL_BATCH_SIZE)), 3)
    rows = cases.noised(share, 3, PLAIN, cases.objective())
    assert report.num_eligible == int(share.is_eligible.sum())
    assert report.masked_tokens == int(rows.is_masked[::2].sum())
    assert report.content_sum == share.content_sum > 2**32  # both halves of the sum matter
    assert report.is_finite


@pytest.mark.promise(
    "the loss of each noise level is the reference network's mean over that band of mask probabilities"
)
@pytest.mark.parametrize("goal", [cases.objective(), cases.objective(complementary=False, mask_logit="included")])
def test_loss_by_noise_level_is_the_reference_networks_mean_of_each_band(build, goal):
    engine = build(OPTIONS, goal=goal, micro_batch_size=2)
    report = cases.take_step(engine, 1, learning_rate=0.0)
    means, counts = cases.reference_noise_levels(cases.reference(OPTIONS), 1, goal)
    assert report.masked_tokens_by_noise_level == counts
    assert goal.complementary or 0 in counts  # eight rows of one view leave levels without any
    for mean, expected in zip(report.loss_by_noise_level, means, strict=True):
        assert mean == (None if expected is None else pytest.approx(expected, rel=1e-5))


@pytest.mark.promise("the losses by noise level do not depend on the micro-batch size")
def test_loss_by_noise_level_stays_when_the_micro_batch_size_changes(build):
    first, second = (cases.take_step(build(micro_batch_size=size), 1) for size in (1, 4))
    assert first.masked_tokens_by_noise_level == second.masked_tokens_by_noise_level
    assert sum(first.masked_tokens_by_noise_level) == first.num_eligible  # the pair masks each eligible token once
    for one, two in zip(first.loss_by_noise_level, second.loss_by_noise_level, strict=True):
        assert one == (None if two is None else pytest.approx(two, rel=1e-6))


@pytest.mark.promise("the padding multiple of the vocabulary changes nothing")
def test_loss_stays_when_only_the_padding_of_the_vocabulary_changes(build):
    reports = []
    for padded in (61, 64, 192):
        engine = build(dataclasses.replace(PLAIN, padded_vocab_size=padded))
        reports.append([cases.take_step(engine, step) for step in (1, 2, 3)])
    for other in reports[1:]:
        for one, two in zip(reports[0], other, strict=True):
            assert two.loss == pytest.approx(one.loss, rel=1e-6)
            assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


@pytest.mark.promise("the micro-batch size changes nothing")
def test_losses_stay_when_the_micro_batch_size_changes(build):
    """float32 sums in another order; 1e-6 is about ten units in the last place."""
    losses = {}
    for size in (1, 2, 4):
        engine = build(micro_batch_size=size)
        losses[size] = [cases.take_step(engine, step).loss for step in (1, 2, 3)]
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)
    assert losses[4] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.promise("gradient accumulation changes neither loss nor weights")
def test_gradient_accumulation_changes_neither_loss_nor_weights(build):
    """8, 4, 2 and 1 passes a step. A large eps, so that AdamW does not blow the rounding of a tiny gradient up."""
    losses, weights = {}, {}
    for num_micro_batches in (1, 2, 4, 8):
        engine = build(micro_batch_size=cases.GLOBAL_BATCH_SIZE // num_micro_batches, eps=1e-3)
        losses[num_micro_batches] = [cases.take_step(engine, step).loss for step in (1, 2, 3, 4)]
        weights[num_micro_batches] = {
            name: parameter.detach().clone() for name, parameter in engine._rank_model.network.named_parameters()
        }
    for num_micro_batches in (2, 4, 8):
        assert losses[num_micro_batches] == pytest.approx(losses[1], rel=1e-6)
        for name, weight in weights[num_micro_batches].items():
            torch.testing.assert_close(weight, weights[1][name], rtol=1e-5, atol=1e-5)


def test_loss_falls(build):
    engine = build(micro_batch_size=4)
    losses = [cases.take_step(engine, 1 + step % 4, learning_rate=5e-3).loss for step in range(40)]
    assert sum(losses[-4:]) < 0.88 * sum(losses[:4])


@pytest.mark.promise("a step repeats bit for bit")
def test_step_repeats_bit_for_bit(build):
    first = [cases.report_fields(cases.take_step(engine, step)) for engine in [build()] for step in (1, 2)]
    second = [cases.report_fields(cases.take_step(engine, step)) for engine in [build()] for step in (1, 2)]
    assert first == second


def test_padding_rows_of_the_vocabulary_stay_zero(build):
    engine = build(OPTIONS)
    for step in (1, 2):
        cases.take_step(engine, step)
    weights = dict(engine._rank_model.network.named_parameters())["embedding.word_embeddings.weight"]
    assert not weights[OPTIONS.vocab_size :].any()
    assert weights[: OPTIONS.vocab_size].any(dim=1).all()


@pytest.mark.promise("nothing is updated when the loss is not finite")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_is_updated_when_the_loss_is_not_finite(build, poison):
    engine = build()
    cases.take_step(engine, 1)
    parameter = dict(engine._rank_model.network.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
    with torch.no_grad():
        parameter[0, 0] = poison
    before, updates = engine.parameter_digest(), engine._optimizer.num_updates
    report = cases.take_step(engine, 2)
    assert not report.is_finite
    assert not (math.isfinite(report.loss) and math.isfinite(report.grad_norm))
    assert engine.parameter_digest() == before
    assert engine._optimizer.num_updates == updates == 1


NORMS, BIASES, EMBEDDINGS = "weight_decay_on_norms", "weight_decay_on_biases", "weight_decay_on_embeddings"


@pytest.mark.promise("weight decay applies to matrices, and to norms, biases and the embedding as configured")
@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize(
    ("settings", "decayed"),
    [
        ({}, {EMBEDDINGS}),
        ({EMBEDDINGS: False}, set()),
        ({NORMS: True, EMBEDDINGS: False}, {NORMS}),
        ({BIASES: True}, {BIASES, EMBEDDINGS}),
        ({NORMS: True, BIASES: True}, {NORMS, BIASES, EMBEDDINGS}),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none",
)
def test_weight_decay_shrinks_the_chosen_tensors_and_matrices(build, spec, settings, decayed):
    """With zero gradients an update is the decay alone: w -> (1 - rate * decay) * w."""
    engine = build(spec, weight_decay=0.5, **settings)
    weights = dict(engine._rank_model.network.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(2.0)
    engine._optimizer.zero_gradients()
    engine._optimizer.update(learning_rate=0.5, gradient_norm=norm_of(float(engine._optimizer.squared_gradient_norm())))
    for name, weight in weights.items():
        if name.endswith(".bias"):
            is_decayed = BIASES in decayed
        elif "layernorm" in name:
            is_decayed = NORMS in decayed
        else:
            is_decayed = "embedding" not in name or EMBEDDINGS in decayed  # an untied output layer is a matrix
        assert torch.equal(weight, torch.full_like(weight, 1.5 if is_decayed else 2.0)), name


def test_gradients_are_clipped_to_the_configured_norm(build):
    free = build(clip_grad_norm=0.0)
    norm = cases.take_step(free, 1, learning_rate=0.0).grad_norm
    clipped = build(clip_grad_norm=norm / 10)
    assert cases.take_step(clipped, 1, learning_rate=0.0).grad_norm == norm  # reported before clipping
    total = sum(float(gradient.square().sum()) for gradient in cases.canonical_gradients(clipped).values())
    assert math.sqrt(total) == pytest.approx(norm / 10, rel=1e-4)


@pytest.mark.promise(
    "three steps with every setting of the optimizer are those of torch's AdamW on the reference network"
)
@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
def test_three_steps_are_torch_adamws_on_the_reference_network_with_every_setting_of_the_optimizer(build, spec):
    """Unusual betas, an eps as large as a gradient's root mean square, a decay that shows and a clip that bites."""
    beta1, beta2, eps, decay, clip, rate = 0.6, 0.8, 3e-3, 2.0, 0.2, 1e-2
    settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay, "clip_grad_norm": clip}
    engine = build(spec, micro_batch_size=2, **settings)
    model = cases.reference(spec)
    named = dict(model.named_parameters())
    groups = [
        {"params": [weight for weight in named.values() if weight.dim() == 2], "weight_decay": decay},
        {"params": [weight for weight in named.values() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(beta1, beta2), eps=eps)
    for step in (1, 2, 3):
        report = cases.take_step(engine, step, learning_rate=rate)
        adamw.zero_grad()
        cases.reference_loss(model, step, cases.objective()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4) and norm > 2 * clip
        adamw.step()
    expected = {name: weight.detach() for name, weight in named.items()}
    torch.testing.assert_close(cases.canonical_weights(engine), expected, rtol=1e-5, atol=1e-6)
