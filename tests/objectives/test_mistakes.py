"""Five mistakes that are easily made, made on purpose: each is caught by the check that holds the correct objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megamask.evaluation.reference_network import ReferenceScore
from megamask.models import context
from megamask.models.context import Causal, Context
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Rows, Samples
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from support import engine_cases as cases

SPEC = cases.OPTIONS
VOCABULARY = cases.vocabulary(SPEC)
EOD, PAD, MASK = VOCABULARY.eod_token_id, VOCABULARY.pad_token_id, VOCABULARY.mask_token_id
KEY, STEP, LENGTH, SIZE = (cases.SEED, 0), 1, cases.SEQUENCE_LENGTH, 8
PAIR = MaskedObjective(vocabulary=VOCABULARY, noise_schedule="cosine_bd3", complementary=True, mask_logit="excluded")
NEXT = AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded")
BLOCK = BlockObjective(vocabulary=VOCABULARY, block_size=SIZE, clean_half="block_causal", mask_logit="excluded")


def samples() -> Samples:
    """Rows that end with a document, an end of document, and padding."""
    tokens = cases.batch(list(range(8)), STEP).tokens.clone()
    tokens[:, 27], tokens[:, 28:] = EOD, PAD
    return Samples(
        tokens=tokens,
        is_eligible=tokens != PAD,
        sample_index=torch.arange(8),
        batch_position=list(range(8)),
        global_batch_size=8,
    )


def score(rows: Rows) -> torch.Tensor:
    return ReferenceScore(network=cases.reference(SPEC), excluded_ids=frozenset((MASK,)))(rows)


def check_weights(rows: Rows) -> None:
    """1/w of the two views adds up to 1/p', because p/p' + (1 - p)/p' = 1/p'; and more masks weigh less."""
    first, second = rows.weight[::2, 0].double(), rows.weight[1::2, 0].double()
    num_first, num_second = rows.is_scored[::2].sum(dim=1), rows.is_scored[1::2].sum(dim=1)
    clear = (num_first - num_second).abs() > LENGTH // 2
    assert bool(clear.any())
    assert torch.equal((first < second)[clear], (num_first > num_second)[clear])


def check_shift(rows: Rows) -> None:
    """The score of a row is the sum over prefixes that the network reads alone."""
    given, model, total = samples(), cases.reference(SPEC), 0.0
    for i in range(1, 28):
        logits = model.logits(model(given.tokens[:1, :i], Context(pattern=Causal()))[0, -1])
        logits[MASK] = -torch.inf
        total -= float(torch.log_softmax(logits.double(), dim=-1)[given.tokens[0, i]])
    assert float(score(rows)[0]) == pytest.approx(total, rel=1e-5)


def check_clean_half(rows: Rows) -> None:
    """The cost of a block does not depend on its own clean tokens."""
    chosen = torch.zeros_like(rows.is_scored)
    chosen[:, SIZE : 2 * SIZE] = rows.is_scored[:, SIZE : 2 * SIZE]
    one_block = replace(rows, is_scored=chosen)
    other = rows.inputs.clone()
    other[:, LENGTH + SIZE : LENGTH + 2 * SIZE] = (other[:, LENGTH + SIZE : LENGTH + 2 * SIZE] + 1) % 50
    assert torch.equal(score(one_block), score(replace(one_block, inputs=other)))


def check_padding(rows: Rows) -> None:
    """No padding is scored, and the end of the document is."""
    given = samples()
    views = len(rows.inputs) // 8
    targets = given.tokens.repeat_interleave(views, dim=0)
    assert not (rows.is_scored & (targets == PAD)).any()
    assert int((rows.is_scored & (targets == EOD)).sum()) == 8


def check_targets(rows: Rows) -> None:
    """The mask token is not a target, and targets are the clean tokens."""
    assert not (rows.targets[rows.is_scored] == MASK).any()
    assert torch.equal(rows.targets[::2], samples().tokens)


def swapped(rows: Rows) -> Rows:
    order = torch.arange(len(rows.weight)).reshape(-1, 2).flip(1).flatten()
    return replace(rows, weight=rows.weight[order])


CHECKS: dict[str, tuple[Callable[[Rows], None], Callable[[], Rows], Callable[[Rows], Rows]]] = {
    "weight_of_the_wrong_view": (check_weights, lambda: PAIR.rows(samples(), STEP, KEY), swapped),
    "shift_off_by_one": (
        check_shift,
        lambda: NEXT.rows(samples(), STEP, KEY),
        lambda rows: replace(rows, targets=rows.targets.roll(1, dims=1), is_scored=rows.is_scored.roll(1, dims=1)),
    ),
    "eos_padding_scored": (
        check_padding,
        lambda: PAIR.rows(samples(), STEP, KEY),
        lambda rows: PAIR.rows(replace(samples(), is_eligible=torch.ones(8, LENGTH, dtype=torch.bool)), STEP, KEY),
    ),
    "mask_id_in_the_targets": (
        check_targets,
        lambda: PAIR.rows(samples(), STEP, KEY),
        lambda rows: replace(rows, targets=rows.inputs),
    ),
}


@pytest.mark.promise("five mistakes that are easily made in an objective are each caught by a test")
@pytest.mark.parametrize("name", CHECKS)
def test_mistake_is_caught(name: str) -> None:
    check, make, mistaken = CHECKS[name]
    rows = make()
    check(rows)
    with pytest.raises(AssertionError):
        check(mistaken(rows))


@pytest.mark.promise("five mistakes that are easily made in an objective are each caught by a test")
def test_clean_half_that_sees_its_own_block_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = BLOCK.rows(samples(), STEP, KEY)
    check_clean_half(rows)
    correct = context._inside_a_document

    def leaky(pattern, query, key, *, half):
        (query_index, query_position), (key_index, key_position) = query, key
        own_clean = (query_index < half) & (key_index >= half) & (query_position // SIZE == key_position // SIZE)
        return correct(pattern, query, key, half=half) | own_clean

    monkeypatch.setattr(context, "_inside_a_document", leaky)
    with pytest.raises(AssertionError):
        check_clean_half(rows)
