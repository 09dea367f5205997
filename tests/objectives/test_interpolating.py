"""Uniform and mixed noise against a chain of many small steps, written out with transition matrices in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from megamask.diffusion.interpolation import UNIFORM, Mixture, interpolate
from megamask.evaluation.likelihood import evaluate_rows
from megamask.evaluation.reference_network import ReferenceScore
from megamask.objectives.base import Samples, never_written
from megamask.objectives.divergence import Noised, divergence
from megamask.objectives.interpolating import token_ids
from megamask.objectives.mixed import MixedObjective
from megamask.objectives.uniform import UniformObjective
from support import engine_cases as cases

VOCABULARY = cases.vocabulary(cases.OPTIONS)
MASK, PAD = VOCABULARY.mask_token_id, VOCABULARY.pad_token_id
KEY, STEP, LENGTH = (cases.SEED, 0), 2, cases.SEQUENCE_LENGTH
MIXTURES = {
    "uniform": UNIFORM,
    "half": Mixture(slope=0.0, shift=0.0),
    "by_log_snr": Mixture(slope=1.0, shift=-1.0),
    "slope_half": Mixture(slope=0.5, shift=2.0),
}
K = 3  # tokens of the plain model; id 3 is its mask
GUESS = np.array([[0.7, 0.2, 0.1], [0.15, 0.8, 0.05], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])  # p_theta(x | z)


def noise_at(p: float, mixture: Mixture) -> np.ndarray:
    """b_p: probability of noise writing each of the four ids."""
    rho = mixture.uniform_share(p)
    return np.array([p * rho / K] * K + [p * (1 - rho)])


def chain_bound(x: int, mixture: Mixture, steps: int) -> float:
    """The evidence lower bound of a chain of `steps` transitions, each KL between two distributions over four ids."""
    grid = np.linspace(1e-9, 1 - 1e-9, steps + 1)
    total, stay = 0.0, np.eye(4)
    for s, t in itertools.pairwise(grid):
        b_s, b_t, keep = noise_at(s, mixture), noise_at(t, mixture), (1 - t) / (1 - s)
        step = keep * stay + np.maximum(b_t - keep * b_s, 0.0)[None, :]  # [from z_s, to z_t]
        true_s = b_s.copy()
        true_s[x] += 1 - s
        joint = true_s[:, None] * step  # q(z_s, z_t | x)
        for z in range(4):
            q_t = joint[:, z].sum()
            guess_s = b_s + (1 - s) * np.append(GUESS[z], 0.0)
            posterior, model = joint[:, z] / q_t, guess_s * step[:, z]
            model = model / model.sum()
            inside = posterior > 0
            total += q_t * float((posterior[inside] * np.log(posterior[inside] / model[inside])).sum())
    return total


@pytest.mark.promise("the bounds of uniform and mixed noise are those of a chain of small steps")
@pytest.mark.parametrize("name", MIXTURES)
def test_integrated_divergence_is_the_bound_of_a_chain_of_small_steps(name: str) -> None:
    mixture, x, steps = MIXTURES[name], 1, 1500
    can_be_noise = torch.tensor([True, True, True])
    total = 0.0
    for number in range(steps):
        p = (number + 0.5) / steps
        b, e = noise_at(p, mixture), 1e-7
        rate = (noise_at(p + e, mixture) - noise_at(p - e, mixture)) / (2 * e) + b / (1 - p)
        for z in range(4):
            q = b[z] + (1 - p) * (z == x)
            if q < 1e-300:
                continue
            cost = divergence(
                torch.tensor(GUESS[z]).log()[None],
                torch.tensor([x]),
                torch.tensor([z]),
                Noised(alpha=torch.tensor([1 - p]).double(), token_mass=torch.tensor([b[0]]).double()),
                can_be_noise,
            )
            total += rate[z] * float(cost) / steps  # q * rate/q * cost
    assert total == pytest.approx(chain_bound(x, mixture, steps), rel=0.01)


@pytest.mark.parametrize("name", MIXTURES)
def test_noise_has_its_marginal_and_the_weights_are_jump_rates(name: str) -> None:
    mixture, p, count = MIXTURES[name], 0.4, 60_000
    x_0 = torch.full((1, count), 1)
    made = interpolate(
        x_0,
        torch.ones_like(x_0, dtype=torch.bool),
        torch.tensor([7]),
        [p],
        mixture=mixture,
        token_ids=torch.tensor([0, 1, 2]),
        mask_token_id=3,
        key=KEY,
    )
    b, e = noise_at(p, mixture), 1e-6
    q = b + (1 - p) * np.eye(4)[1]
    share = np.bincount(made.x_t[0].numpy(), minlength=4) / count
    assert np.abs(share - q).max() < 0.015  # seven deviations of a share near one half
    rate = (noise_at(p + e, mixture) - noise_at(p - e, mixture)) / (2 * e) + b / (1 - p)
    for z in range(4):
        found = made.rate[0][made.x_t[0] == z].unique()
        if len(found):
            assert float(found) == pytest.approx(rate[z] / q[z], rel=1e-4)
    assert torch.equal(made.x_t != x_0, made.is_corrupted & (made.x_t != x_0))


def test_divergence_is_the_plain_formula_and_finite_for_an_impossible_target() -> None:
    generator = torch.Generator().manual_seed(4)
    log_p = torch.randn(50, 6, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    targets, read = torch.randint(0, 5, (50,), generator=generator), torch.randint(0, 6, (50,), generator=generator)
    alpha = torch.rand(50, generator=generator, dtype=torch.float64)
    mass = (1 - alpha) / 8
    can_be_noise = torch.tensor([True] * 5 + [False])  # id 5 is padding: predicted, never written
    found = divergence(log_p, targets, read, Noised(alpha=alpha, token_mass=mass), can_be_noise)
    for row in range(50):
        x, z, a, c = int(targets[row]), int(read[row]), float(alpha[row]), float(mass[row])
        r = [c + a * (y == x) for y in range(5)]
        q = [c + a * float(log_p[row, y].exp()) for y in range(5)]
        leak = a * float(log_p[row, 5].exp())
        kl = math.fsum(one * math.log(one / other) - one + other for one, other in zip(r, q, strict=True)) + leak
        jump = r[z] / q[z] - math.log(r[z] / q[z]) - 1 if z < 5 else 0.0
        assert float(found[row]) == pytest.approx(kl + jump, rel=1e-6)
    impossible = torch.tensor([[0.0, -200.0, -200.0]])
    cost = divergence(
        impossible,
        torch.tensor([1]),
        torch.tensor([1]),
        Noised(alpha=torch.tensor([0.5]), token_mass=torch.tensor([0.0])),
        torch.tensor([True, True, True]),
    )
    assert torch.isfinite(cost).all() and float(cost) > 10


@pytest.mark.promise("the divergence of interpolating noise has the gradient of its plain formula")
def test_sharded_divergence_and_gradient_are_those_of_the_plain_one(job: object) -> None:
    import torch.distributed as dist

    from megamask.engine.divergence import Shard, ShardedDivergence

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 10, generator=generator) * 3
    is_excluded = torch.zeros(10, dtype=torch.bool)
    is_excluded[[8, 9]] = True
    can_be_noise = ~is_excluded
    can_be_noise[7] = False
    targets, read = torch.randint(0, 7, (40,), generator=generator), torch.randint(0, 9, (40,), generator=generator)
    alpha = torch.rand(40, generator=generator)
    noised = Noised(alpha=alpha, token_mass=torch.where(torch.arange(40) % 4 == 0, 0.0, (1 - alpha) / 9))
    shard = Shard(first_id=0, is_excluded=is_excluded, can_be_noise=can_be_noise, group=dist.group.WORLD)
    weight = torch.rand(40, generator=generator)
    found = ShardedDivergence(logits.clone(), targets, read, noised, shard)
    gradient = found.logit_gradient(weight, 0.2 * found.log_normalizer)

    wide = logits.double().requires_grad_()
    masked = wide.masked_fill(is_excluded, float("-inf"))
    double = Noised(alpha=noised.alpha.double(), token_mass=noised.token_mass.double())
    expected = divergence(masked.log_softmax(dim=1)[:, :8], targets, read, double, can_be_noise[:8])
    ((expected * weight.double()).sum() + 0.1 * masked.logsumexp(dim=1).square().sum()).backward()
    torch.testing.assert_close(found.cross_entropy.double(), expected, rtol=1e-4, atol=1e-5)
    assert wide.grad is not None
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-3, atol=1e-5)
    assert not gradient[:, 8:].any()


def objectives() -> dict[str, UniformObjective | MixedObjective]:
    mixed = MixedObjective(vocabulary=VOCABULARY, corruption="log_snr", noise_schedule="linear", mask_logit="excluded")
    edit = MixedObjective(vocabulary=VOCABULARY, corruption="edit", noise_schedule="linear", mask_logit="excluded")
    uniform = UniformObjective(vocabulary=VOCABULARY, noise_schedule="cosine_bd3", mask_logit="excluded")
    return {"uniform": uniform, "log_snr": mixed, "edit": edit}


def samples(count: int = 16) -> Samples:
    share = cases.batch(list(range(8)), STEP)
    return Samples(
        tokens=share.tokens.repeat(count // 8, 1),
        is_eligible=share.is_eligible.repeat(count // 8, 1),
        sample_index=torch.arange(count),
        batch_position=list(range(count)),
        global_batch_size=count,
    )


@pytest.mark.parametrize("name", objectives())
def test_noise_stays_among_real_tokens_and_leaves_what_is_not_eligible(name: str) -> None:
    objective, given = objectives()[name], samples()
    rows = objective.rows(given, STEP, KEY)
    assert torch.equal(rows.inputs[~given.is_eligible], given.tokens[~given.is_eligible])
    assert not (rows.is_scored & ~given.is_eligible).any()
    assert torch.equal(rows.targets, given.tokens)
    written = set(rows.inputs.flatten().tolist())
    assert PAD not in written - set(given.tokens.flatten().tolist())
    assert (MASK in written) == (name != "uniform")
    assert set(token_ids(VOCABULARY, rows.inputs.device).tolist()) == set(range(VOCABULARY.vocab_size)) - never_written(
        VOCABULARY
    )
    if name == "edit":
        is_random = rows.part == 1
        assert bool(is_random.any()) and not (rows.inputs[is_random] == MASK).any()
        assert (rows.weight[is_random] == 1).all()
    else:
        assert torch.equal(rows.is_scored, given.is_eligible)
    details = objective.details(given, STEP, KEY)
    leveled = rows.is_scored & (rows.group >= 0)
    assert [detail["masked"] for detail in details] == [row.nonzero().flatten().tolist() for row in leveled]


@pytest.mark.parametrize("name", ["uniform", "log_snr"])
def test_training_loss_and_bound_agree_for_a_fixed_network(name: str) -> None:
    objective, given = objectives()[name], samples(8)
    score = ReferenceScore(
        network=cases.reference(cases.OPTIONS),
        excluded_ids=frozenset((MASK,)),
        not_noise=never_written(VOCABULARY),
    )
    report = evaluate_rows(
        score,
        objective.bound,
        given.tokens,
        given.is_eligible,
        torch.arange(8),
        draws=32,
        replicates=4,
        key=KEY,
        batch_rows=8,
    )
    losses = []
    for step in range(1, 65):
        rows = objective.rows(given, step, KEY)
        losses.append(float(score(rows).sum()) / int(given.is_eligible.sum()))
    mean = math.fsum(losses) / len(losses)
    assert mean == pytest.approx(report.nelbo_nats_per_token, rel=0.1)
    assert math.log(58) * 0.7 < report.nelbo_nats_per_token < math.log(58) * 2
