"""The noise law gives the same bits on CUDA as on the CPU."""

from __future__ import annotations

import pytest
import torch

from megamask.diffusion.corruption import corrupt
from megamask.diffusion.philox import philox4x32, run_key
from megamask.diffusion.schedule import noise_schedule
from megamask.models.initial_weights import initial_tensor
from megamask.models.shapes import canonical_shapes
from support.specs import small_spec

pytestmark = pytest.mark.gpu


def test_philox_words_are_equal_on_cuda(device: torch.device) -> None:
    counter = torch.arange(1 << 20) * 4099
    host = philox4x32((counter, counter >> 7, 3, 1), (5, 2**32 - 1))
    there = counter.to(device)
    words = philox4x32((there, there >> 7, 3, 1), (5, 2**32 - 1))
    for expected, word in zip(host, words, strict=True):
        assert torch.equal(expected, word.cpu())


def test_masks_and_weights_of_views_are_equal_on_cuda(device: torch.device) -> None:
    x_0 = torch.arange(16 * 128).reshape(16, 128)
    made = [
        corrupt(
            x_0.to(place),
            (x_0 % 7 != 0).to(place),
            torch.arange(16, device=place) + 2**33,
            [k / 16 for k in range(16)],
            schedule=noise_schedule("cosine_md4"),
            complementary=True,
            mask_token_id=9999,
            key=run_key(2**60 + 3),
        )
        for place in (torch.device("cpu"), device)
    ]
    for name in ("x_t", "x_0", "is_masked", "weight"):
        assert torch.equal(getattr(made[0], name), getattr(made[1], name).cpu())


def test_initial_weights_are_equal_on_cuda(device: torch.device) -> None:
    spec = small_spec(vocab_size=5000)
    for name in canonical_shapes(spec):
        assert torch.equal(initial_tensor(1, name, spec), initial_tensor(1, name, spec, device=device).cpu())
