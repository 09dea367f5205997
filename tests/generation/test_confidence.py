from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamask.diffusion.philox import Purpose, uniform_words
from megamask.diffusion.sampling import Draw, Prediction, choose, score_slice
from megamask.errors import UsageError
from megamask.generation.confidence import Decoded, DecodingOptions, decode, quotas, steps_of_blocks
from megamask.objectives.base import Reading
from megamask.objectives.masked import MaskedDecoder

DECODER = MaskedDecoder()
VOCAB, PAD, MASK = 11, 9, 10
ANSWER = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 8, 7])


def predictor(logits_of: Any) -> Any:
    """A network that answers with logits [s, v] for each row."""

    def predict(reading: Reading, draw: Draw) -> Prediction:
        logits = torch.stack([logits_of(row) for row in reading.inputs])
        rows, places = reading.is_read.nonzero(as_tuple=True)
        is_excluded = torch.arange(VOCAB) >= PAD
        scores = score_slice(
            logits[rows, places],
            places,
            rows,
            num_positions=reading.num_positions,
            vocab_size=VOCAB,
            first_token=0,
            is_excluded=is_excluded,
            draw=draw,
        )
        return choose(scores[None])

    return predict


def knows_the_answer(x_t: Tensor) -> Tensor:
    """Sure of the answer everywhere, surer further right; it also likes padding and the mask, which must not show."""
    sureness = 2.0 + torch.arange(len(x_t)) / len(x_t)
    logits = torch.zeros(len(x_t), VOCAB)
    logits.scatter_(1, ANSWER[: len(x_t), None], sureness[:, None])
    logits[:, [PAD, MASK]] = 50.0
    return logits


def _masked(positions: list[int]) -> Tensor:
    tokens = ANSWER.clone()
    tokens[positions] = MASK
    return tokens


def _decode_one(tokens: Tensor, logits_of: Any = knows_the_answer, sequence: int = 0, **options: Any) -> Decoded:
    [found] = decode(
        predictor(logits_of),
        DECODER,
        tokens[None],
        is_wanted=tokens[None] == MASK,
        options=DecodingOptions(**options),
        sequences=[sequence],
    )
    assert found.nfe == found.num_denoising_steps == len(found.committed)
    return found


def _decode(tokens: Tensor, **options: Any) -> tuple[Tensor, list[list[int]]]:
    found = _decode_one(tokens, **options)
    return found.tokens, found.committed


@pytest.mark.parametrize("steps", [None, 1, 3, 7, 8])
@pytest.mark.parametrize("block_length", [None, 8, 3])
def test_decoder_restores_what_the_network_knows(steps: int | None, block_length: int | None) -> None:
    if steps == 1 and block_length == 3:
        steps = 4
    tokens, _ = _decode(_masked(list(range(4, 12))), num_denoising_steps=steps, block_length=block_length)
    assert torch.equal(tokens, ANSWER)


def test_most_confident_positions_are_committed_first_in_exact_quotas() -> None:
    _, committed = _decode(_masked(list(range(4, 12))), num_denoising_steps=3)
    assert committed == [[9, 10, 11], [6, 7, 8], [4, 5]]


def test_blocks_are_finished_from_left_to_right() -> None:
    _, committed = _decode(_masked(list(range(4, 12))), num_denoising_steps=4, block_length=4)
    assert committed == [[6, 7], [4, 5], [10, 11], [8, 9]]


def knows_a_joint(x_t: Tensor) -> Tensor:
    """Exact conditionals of three tokens of {0, 1}: the third is their exclusive or, flipped with probability 1/8."""
    weights = {(a, b, c): (0.3 if a else 0.7) * 0.5 * (7 if a ^ b == c else 1) / 8 for a, b, c in _BITS}
    logits = torch.full((3, VOCAB), -torch.inf)
    for place in range(3):
        for value in (0, 1):
            fits = (
                weight
                for bits, weight in weights.items()
                if bits[place] == value and all(i == place or x_t[i] in (MASK, bit) for i, bit in enumerate(bits))
            )
            logits[place, value] = math.log(sum(fits))
    return logits


_BITS = list(itertools.product((0, 1), repeat=3))


@pytest.mark.promise("ancestral sampling draws from the distribution that a perfect network has learnt")
def test_random_order_at_temperature_1_samples_the_joint_distribution() -> None:
    count = 4000
    tokens = torch.full((count, 3), MASK)
    options = DecodingOptions(order="random", temperature=1.0, seed=5)
    table = {key: knows_a_joint(torch.tensor(key)) for key in itertools.product((0, 1, MASK), repeat=3)}
    found = decode(
        predictor(lambda x_t: table[tuple(x_t.tolist())]),
        DECODER,
        tokens,
        is_wanted=tokens == MASK,
        options=options,
        sequences=range(count),
    )
    orders = Counter(tuple(step for [step] in row.committed) for row in found)
    drawn = Counter(tuple(row.tokens.tolist()) for row in found)
    assert len(orders) == 6
    expected = {(a, b, c): (0.3 if a else 0.7) * 0.5 * (7 if a ^ b == c else 1) / 8 for a, b, c in _BITS}
    for counts, shares in ((orders, dict.fromkeys(orders, 1 / 6)), (drawn, expected)):
        for key, share in shares.items():  # 6.2 standard deviations: 14 checks fail correct code once in 10^8
            assert abs(counts[key] / count - share) < 6.2 * math.sqrt(share * (1 - share) / count)
    by_words = uniform_words(torch.tensor([2]), 3, purpose=Purpose.DECODING_ORDER, key=(5, 0))[0].argsort().tolist()
    assert [step for [step] in found[2].committed] == by_words


@pytest.mark.promise("infilling keeps every given token")
def test_infill_keeps_every_fixed_token() -> None:
    prompt = torch.tensor([8, MASK, 8, MASK, MASK, 8])  # fixed tokens the network would choose otherwise
    tokens, committed = _decode(prompt, num_denoising_steps=2)
    assert tokens.tolist() == [8, 1, 8, 1, 5, 8]
    assert committed == [[3, 4], [1]]
    assert prompt.tolist() == [8, MASK, 8, MASK, MASK, 8]


def test_equally_confident_positions_go_from_left_to_right() -> None:
    found = _decode_one(torch.full((5,), MASK), lambda x_t: torch.zeros(len(x_t), VOCAB))
    assert found.committed == [[0], [1], [2], [3], [4]]


@pytest.mark.promise("rounding in the network does not decide between equal positions")
def test_rounding_in_the_network_does_not_choose_among_equals() -> None:
    """Noise of the size that another order of float32 sums makes; the rightmost is the largest."""
    logits = torch.zeros(5, VOCAB, dtype=torch.float64)
    logits[:, 3] = 1.0 + 1e-7 * torch.arange(5)
    assert _decode_one(torch.full((5,), MASK), lambda x_t: logits).committed == [[0], [1], [2], [3], [4]]


def test_network_sees_what_was_committed_and_only_that() -> None:
    seen: list[list[int]] = []

    def watch(x_t: Tensor) -> Tensor:
        seen.append(x_t.tolist())
        return knows_the_answer(x_t)

    _decode_one(_masked([2, 3]), watch)
    assert [row[2:4] for row in seen] == [[MASK, MASK], [MASK, 1]]


def test_masks_that_are_not_wanted_stay_and_the_network_sees_them() -> None:
    seen: list[list[int]] = []

    def watch(x_t: Tensor) -> Tensor:
        seen.append(x_t.tolist())
        return knows_the_answer(x_t)

    tokens = torch.tensor([[3, MASK, MASK, MASK, MASK]])
    is_wanted = torch.tensor([[False, True, True, False, False]])
    [found] = decode(predictor(watch), DECODER, tokens, is_wanted=is_wanted, options=DecodingOptions())
    assert found.tokens.tolist() == [3, 1, 4, MASK, MASK]
    assert [row[3:] for row in seen] == [[MASK, MASK]] * 2


def depends_on_the_row(x_t: Tensor) -> Tensor:
    """Every logit depends on every token of the row."""
    start = int((x_t * torch.arange(1, len(x_t) + 1)).sum())
    return torch.rand(len(x_t), VOCAB, generator=torch.Generator().manual_seed(start))


@pytest.mark.promise("rows decoded together equal rows decoded alone")
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("block_length", [None, 3])
def test_rows_side_by_side_are_those_decoded_alone(temperature: float, block_length: int | None) -> None:
    rows = [_masked([1, 2, 3]), _masked(list(range(12))), _masked([0, 5, 6, 7, 8, 11])]
    options = {"temperature": temperature, "block_length": block_length, "seed": 3}
    together = decode(
        predictor(depends_on_the_row),
        DECODER,
        torch.stack(rows),
        is_wanted=torch.stack(rows) == MASK,
        options=DecodingOptions(**options),
        sequences=[4, 7, 2**40],
    )
    for row, sequence, found in zip(rows, [4, 7, 2**40], together, strict=True):
        alone = _decode_one(row, depends_on_the_row, sequence, **options)
        assert found.tokens.tolist() == alone.tokens.tolist()
        assert found.committed == alone.committed


def test_nothing_outside_the_allowed_vocabulary_is_ever_sampled_at_high_temperature() -> None:
    for seed in range(20):
        tokens, _ = _decode(torch.full((12,), MASK), temperature=100.0, seed=seed)
        assert set(tokens.tolist()) <= set(range(PAD))


@pytest.mark.promise("a sample is a function of seed and sequence")
def test_sample_is_a_function_of_seed_and_sequence() -> None:
    def sample(seed: int, sequence: int) -> list[int]:
        tokens, _ = _decode(torch.full((12,), MASK), temperature=5.0, seed=seed, sequence=sequence)
        return tokens.tolist()

    assert sample(1, 0) == sample(1, 0)
    assert len({tuple(sample(seed, sequence)) for seed in (1, 2**40) for sequence in (0, 1)}) == 4


@given(num_masked=st.integers(1, 500), data=st.data())
def test_quotas_add_up_and_differ_by_at_most_one_with_the_larger_first(num_masked: int, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, num_masked))
    found = quotas(num_masked, num_steps)
    assert sum(found) == num_masked and len(found) == num_steps
    assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1 and found[-1] >= 1


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), data=st.data())
def test_steps_are_dealt_to_blocks_without_an_empty_step(sizes: list[int], data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(len(sizes), sum(sizes)))
    found = steps_of_blocks(sizes, num_steps)
    assert sum(found) == num_steps
    assert all(1 <= steps <= size for steps, size in zip(found, sizes, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_denoising_steps": 0}, "--steps is 0"),
        ({"num_denoising_steps": 9}, "9 denoising steps for 8 masked tokens"),
        ({"num_denoising_steps": 1, "block_length": 4}, "allowed: 2 to 8"),
        ({"block_length": 0}, "--block-length is 0"),
        ({"order": "left"}, "--order is 'left'; allowed: confidence, random"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _decode(_masked(list(range(4, 12))), **options)


def test_sequence_without_masks_is_refused() -> None:
    with pytest.raises(UsageError, match="no masked token"):
        _decode(ANSWER)
