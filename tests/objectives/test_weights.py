"""Weights and recipes against their formulas, written out token by token in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
from megamask.diffusion.schedule import EPS, independent_times, noise_schedule
from megamask.errors import UsageError
from megamask.objectives.base import Rows, Samples
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.terms import Counts, Scores
from megamask.objectives.weights import RECIPES, cart_weights
from support.command import TINY
from support.model_documents import model_document
from support.objectives import masked_objective

VOCABULARY = model_document().vocabulary
KEY, STEP, LENGTH = (7, 0), 3, 24


def samples(count: int = 16) -> Samples:
    generator = torch.Generator().manual_seed(5)
    return Samples(
        tokens=torch.randint(0, 23, (count, LENGTH), generator=generator),
        is_eligible=torch.rand(count, LENGTH, generator=generator) < 0.9,
        sample_index=torch.arange(100, 100 + count),
        batch_position=list(range(count)),
        global_batch_size=count,
    )


def costs(rows: Rows) -> torch.Tensor:
    return torch.rand(rows.inputs.shape, generator=torch.Generator().manual_seed(8)) * 5


def loss_of(objective: MaskedObjective, given: Samples, rows: Rows) -> float:
    """The loss from the terms, as the step computes it, with made-up cross entropies."""
    cost = costs(rows).flatten()
    scores = Scores(
        cross_entropy=cost,
        log_normalizer=cost,
        weight=rows.weight.flatten(),
        part=None,
        is_used=rows.is_scored.flatten(),
    )
    counts = Counts(num_eligible=int(given.is_eligible.sum()), num_scored=[int(rows.is_scored.sum())])
    [term] = objective.terms
    return float(term.share(scores)) / term.normalizer(counts) + term.constant


def masked_at(rows: Rows, row: int) -> list[int]:
    return [i for i in range(LENGTH) if rows.is_scored[row, i]]


PUBLISHED = {
    # probability of a mask at t; weight of a masked token at t with k of n tokens masked; divided by
    "llada": (lambda t: (1 - 1e-3) * t + 1e-3, lambda p, n, k: 1 / p, "eligible"),
    "mdlm": (lambda t: (1 - 1e-3) * t + 1e-3, lambda p, n, k: 1 / p, "eligible"),
    "md4": (lambda t: 1e-4 + (1 - 2e-4) * t, lambda p, n, k: (1 - 2e-4) / p, "eligible"),
    "megadlms": (lambda t: t, lambda p, n, k: n / k, "masked"),
    "dream": (lambda t: t, lambda p, n, k: 1 / p, "masked"),
}


@pytest.mark.promise("a recipe's loss is its project's formula on the same masks")
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_loss_is_its_projects_formula_on_the_same_masks(name: str) -> None:
    objective, given = masked_objective(VOCABULARY, recipe=name, complementary=False), samples()
    rows, times = objective.rows(given, STEP, KEY), [d["t"] for d in objective.details(given, STEP, KEY)]
    probability, weight, divided_by = PUBLISHED[name]
    cost, total, num_masked = costs(rows), 0.0, 0
    for row, t in enumerate(times):
        masked, n = masked_at(rows, row), int(given.is_eligible[row].sum())
        num_masked += len(masked)
        total += math.fsum(weight(probability(t), n, len(masked)) * float(cost[row, i]) for i in masked)
    count = num_masked if divided_by == "masked" else int(given.is_eligible.sum())
    reconstruction = 1e-4 * math.log(VOCABULARY.vocab_size - 1) if name == "md4" else 0.0
    assert loss_of(objective, given, rows) == pytest.approx(total / count + reconstruction, rel=1e-6)
    assert not (rows.is_scored & ~given.is_eligible).any()


def test_md4_takes_its_cosine_schedule_too() -> None:
    objective = masked_objective(VOCABULARY, recipe="md4", complementary=False, noise_schedule="cosine_md4")
    given = samples()
    rows, times = objective.rows(given, STEP, KEY), [d["t"] for d in objective.details(given, STEP, KEY)]
    for row, t in enumerate(times):
        p = 1e-4 + (1 - 2e-4) * math.sin(math.pi * t / 2)
        slope = (1 - 2e-4) * math.pi / 2 * math.cos(math.pi * t / 2)
        assert float(rows.weight[row, 0]) == pytest.approx(slope / p, rel=1e-5)


def test_mdlm_and_md4_spread_their_times_and_the_others_draw_each_by_itself() -> None:
    given = samples()
    for name in RECIPES:
        objective = masked_objective(VOCABULARY, recipe=name, complementary=False)
        times = [d["t"] for d in objective.details(given, STEP, KEY)]
        strata = sorted(int(t * 16) for t in times)
        assert (strata == list(range(16))) == (name in ("mdlm", "md4"))
        assert name in ("mdlm", "md4") or times == independent_times(given.sample_index.tolist(), KEY)


def test_megadlms_masks_at_least_one_token_of_each_row() -> None:
    given = samples(400)
    rows = masked_objective(VOCABULARY, recipe="megadlms", complementary=False).rows(given, STEP, KEY)
    plain = masked_objective(VOCABULARY, recipe="dream", complementary=False).rows(given, STEP, KEY)
    counts, without = rows.is_scored.sum(dim=1), plain.is_scored.sum(dim=1)
    assert int(without.min()) == 0  # else the test would show nothing
    assert counts.tolist() == without.clamp(min=1).tolist()
    assert torch.equal(rows.inputs == VOCABULARY.mask_token_id, rows.is_scored)


@pytest.mark.parametrize("kind", ["unit", "one_minus_t", "any_order", "cart"])
@pytest.mark.parametrize("complementary", [False, True])
def test_weight_is_its_closed_form_in_each_view(kind: str, complementary: bool) -> None:
    objective, given = masked_objective(VOCABULARY, weight=kind, complementary=complementary), samples()
    rows, num_views = objective.rows(given, STEP, KEY), 2 if complementary else 1
    times = [d["t"] for d in objective.details(given, STEP, KEY)]
    for row in range(len(rows.inputs)):
        sample, view = divmod(row, num_views)
        masked, n = masked_at(rows, row), int(given.is_eligible[sample].sum())
        visible = [j for j in range(LENGTH) if given.is_eligible[sample, j] and j not in masked]
        t = times[sample] if view == 0 else 1 - times[sample]  # a view weighed by the other's t would show
        for i in masked:
            expected = {
                "unit": 1.0,
                "one_minus_t": 1 - t,
                "any_order": n / len(masked),
                "cart": 0.5 * math.fsum(0.3 * 0.7 ** (abs(i - j) - 1) for j in visible),
            }[kind]
            assert float(rows.weight[row, i]) == pytest.approx(expected, rel=1e-6)
    assert [term.name for term in objective.terms] == ["nelbo" if kind == "any_order" else "masked_cross_entropy"]


def test_cart_weighs_a_token_beside_visible_ones_more() -> None:
    is_masked = torch.tensor([[False, True, True, True, True, False]])
    weights = cart_weights(is_masked, torch.ones_like(is_masked), p=0.3)[0]
    assert weights[1] == weights[4] > weights[2] == weights[3]


@pytest.mark.parametrize(("name", "exponent"), [("sqrt", 1.0), ("polynomial", 1.0), ("polynomial", 2.5)])
def test_schedule_rises_from_end_to_end_and_leaves_the_bound_alone(name: str, exponent: float) -> None:
    schedule = noise_schedule(name, exponent)
    assert schedule.mask_probability(0.0) == pytest.approx(EPS)
    assert schedule.mask_probability(1.0) == pytest.approx(1 - EPS)
    for t in (0.00005, 0.2, 0.7):
        slope = (schedule.mask_probability(t + 1e-7) - schedule.mask_probability(t - 1e-7)) / 2e-7
        assert schedule.derivative(t) == pytest.approx(slope, rel=1e-4)
    # integral of p'/p * f(p) dt is that of f(p)/p dp, for every schedule; f(p) = p^2 gives (p1^2 - p0^2) / 2
    steps = 200_000
    grid = [((i + 0.5) / steps) ** 2 for i in range(steps)]  # dense near 0, where sqrt is steep
    total = math.fsum(
        schedule.derivative(t) * schedule.mask_probability(t) * 2 * (i + 0.5) / steps / steps
        for i, t in enumerate(grid)
    )
    assert total == pytest.approx(((1 - EPS) ** 2 - EPS**2) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("objective.recipe=llada", "objective.complementary=true"),
            "objective.complementary is true, but objective.recipe is llada",
        ),
        (
            ("objective.weight=unit", "objective.time_sampling=importance"),
            "objective.time_sampling is 'importance', but objective.weight is unit",
        ),
        (("objective.noise_exponent=2",), "objective.noise_exponent is 2"),
        (
            ("objective.recipe=dream", "objective.weight=unit"),
            "objective.weight is 'unit', but objective.recipe is dream",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: tuple[str, ...], words: str) -> None:
    loaded = load_train_config(TINY, list(settings))
    with pytest.raises(UsageError) as caught:
        validate_train(loaded.config, loaded.origins)
    assert words in caught.value.message


def test_recipe_alone_trains_one_view_and_everything_else_the_pair() -> None:
    def views(*settings: str) -> bool:
        config = load_train_config(TINY, list(settings)).config
        validate_train(config)
        return bool(config.objective.settings()["complementary"])

    assert views() is True
    assert views("objective.recipe=llada") is False
    assert views("objective.recipe=llada", "objective.complementary=null") is False
    assert views("objective.complementary=false") is False
