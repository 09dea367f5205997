from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megamask.errors import UsageError
from megamask.generation.confidence import (
    DecodingOptions,
    decode,
    gumbel_noise,
    quotas,
    steps_of_blocks,
)
from support.order_oracle import philox4x32_10

VOCAB, PAD, MASK = 11, 9, 10
ANSWER = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 8, 7])


def knows_the_answer(x_t: Tensor, positions: Tensor) -> Tensor:
    """Sure of the answer everywhere, surer further right; it also likes padding and the mask, which must not show."""
    sureness = 2.0 + torch.arange(len(x_t)) / len(x_t)
    logits = torch.zeros(len(x_t), VOCAB)
    logits.scatter_(1, ANSWER[: len(x_t), None], sureness[:, None])
    logits[:, [PAD, MASK]] = 50.0
    return logits[positions]


def _masked(positions: list[int]) -> Tensor:
    tokens = ANSWER.clone()
    tokens[positions] = MASK
    return tokens


def _decode(tokens: Tensor, **options: object) -> tuple[Tensor, list[list[int]]]:
    found = decode(
        knows_the_answer,
        tokens,
        mask_token_id=MASK,
        forbidden=frozenset({PAD}),
        options=DecodingOptions(**options),  # type: ignore[arg-type]
    )
    assert found.nfe == found.num_denoising_steps == len(found.committed)
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


def test_infill_keeps_every_fixed_token() -> None:
    prompt = torch.tensor([8, MASK, 8, MASK, MASK, 8])  # fixed tokens the network would choose otherwise
    tokens, committed = _decode(prompt, num_denoising_steps=2)
    assert tokens.tolist() == [8, 1, 8, 1, 5, 8]
    assert committed == [[3, 4], [1]]
    assert prompt.tolist() == [8, MASK, 8, MASK, MASK, 8]


def test_equally_confident_positions_go_from_left_to_right() -> None:
    found = decode(
        lambda x_t, positions: torch.zeros(len(positions), VOCAB),
        torch.full((5,), MASK),
        mask_token_id=MASK,
        forbidden=frozenset({PAD}),
        options=DecodingOptions(num_denoising_steps=5),
    )
    assert found.committed == [[0], [1], [2], [3], [4]]


def test_network_sees_what_was_committed_and_only_that() -> None:
    seen: list[list[int]] = []

    def watch(x_t: Tensor, positions: Tensor) -> Tensor:
        seen.append(x_t.tolist())
        return knows_the_answer(x_t, positions)

    decode(
        watch,
        _masked([2, 3]),
        mask_token_id=MASK,
        forbidden=frozenset({PAD}),
        options=DecodingOptions(),
    )
    assert [row[2:4] for row in seen] == [[MASK, MASK], [MASK, 1]]


def test_nothing_outside_the_allowed_vocabulary_is_ever_sampled_at_high_temperature() -> None:
    for seed in range(20):
        tokens, _ = _decode(torch.full((12,), MASK), temperature=100.0, seed=seed)
        assert set(tokens.tolist()) <= set(range(PAD))


def test_sample_is_a_function_of_seed_and_sequence() -> None:
    def sample(seed: int, sequence: int) -> list[int]:
        tokens, _ = _decode(torch.full((12,), MASK), temperature=5.0, seed=seed, sequence=sequence)
        return tokens.tolist()

    assert sample(1, 0) == sample(1, 0)
    assert len({tuple(sample(seed, sequence)) for seed in (1, 2**40) for sequence in (0, 1)}) == 4


def test_temperature_samples_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    count, temperature = 6000, 2.0
    noise = gumbel_noise(torch.arange(count), count, 3, step=1, seed=5, sequence=0)
    chosen = (logits + temperature * noise).argmax(dim=1)
    for token, probability in enumerate(torch.softmax(logits / temperature, dim=0).tolist()):
        share = float((chosen == token).double().mean())
        assert abs(share - probability) < 6.2 * math.sqrt(probability * (1 - probability) / count)


@given(
    positions=st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True),
    vocab_size=st.integers(1, 13),
    step=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**40),
)
def test_noise_of_a_position_follows_the_law_whoever_else_is_asked_for(
    positions: list[int], vocab_size: int, step: int, seed: int, sequence: int
) -> None:
    noise = gumbel_noise(torch.tensor(positions), 64, vocab_size, step=step, seed=seed, sequence=sequence)
    key = (seed % 2**32, seed // 2**32)
    for row, position in enumerate(positions):
        for token in range(vocab_size):
            word, lane = divmod(position * vocab_size + token, 4)
            bits = philox4x32_10((sequence % 2**32, sequence // 2**32, word, 6 + 256 * step), key)[lane]
            expected = -math.log(-math.log((bits + 0.5) / 2**32))
            assert float(noise[row, token]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


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


def test_noise_beyond_the_counter_is_refused() -> None:
    with pytest.raises(UsageError, match="counter"):
        gumbel_noise(torch.tensor([0]), 1 << 20, 1 << 14, step=1, seed=0, sequence=0)
