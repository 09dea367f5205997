"""Counter-based random bits: Philox4x32-10 on torch integer tensors.

Every random decision of a run is a pure function of (key, index, position, purpose, draw), the noise law of
docs/architecture.md, section 4. The bits are equal on CPU and GPU, for a slice and for the full tensor.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; golden vectors: Random123.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

NOISE_LAW_VERSION = 1

_MASK_32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_ROUNDS = 10
_MAX_DRAW = 1 << 24
# Counters that each CPU thread works on at a time: five int64 tensors of them stay in its cache.
_CHUNK_OF_CPU = 1 << 15
_CHUNK_ELSEWHERE = 1 << 24

rounds_by_device: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
"""Kernels with the values of `rounds`, by the type of the devices that use them; other devices count in place."""


class Purpose(IntEnum):
    """Purpose of a stream of random words; a closed enumeration, a number is never reused."""

    MASK = 1
    STRATIFIED_TIME = 2
    RANDOM_TOKEN = 3
    LENGTH = 4
    BLOCK_TIME = 5
    DECODING = 6
    INITIAL_WEIGHTS = 7
    INDEPENDENT_TIME = 8
    VALIDATION_MASK = 9
    VALIDATION_TIME = 10
    BLOCK_ORDER = 11
    ROW_ORDER = 12
    VALIDATION_BLOCK_COUNT = 13
    VALIDATION_RANDOM_TOKEN = 14
    UNDECODED = 15
    MIXTURE_ORDER = 16
    ATTENTION_OPENING = 20
    EMBEDDING_NOISE = 21
    DECODING_ORDER = 22


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four output words of each counter under a key.

    Args:
        counter: four 32-bit words, ints or integer tensors that broadcast together; bits above the 32nd are ignored.
        key: two 32-bit words, ints or integer tensors that broadcast with the counter.

    Returns:
        Four int64 tensors of the broadcast shape, words in [0, 2^32), on the device of the tensors given (CPU for
        ints alone). None of them shares memory with an input.

    Raises:
        ValueError: when there are not four counter words and two key words.
        TypeError: for a word that is neither an int nor an integer tensor.
    """
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(f"Philox4x32 takes 4 counter words and 2 key words, not {len(counter)} and {len(key)}")
    shape, device = _shape_and_device([*counter, *key])
    if device.type in rounds_by_device:
        return rounds_by_device[device.type](*(_scalar_or_view(word, shape, device) for word in (*counter, *key)))
    words = [_filled(word, shape, device) for word in counter]
    keys = [word & _MASK_32 if isinstance(word, int) else _filled(word, shape, device).view(-1) for word in key]
    flat = [word.view(-1) for word in words]
    chunk = _CHUNK_OF_CPU * torch.get_num_threads() if device.type == "cpu" else _CHUNK_ELSEWHERE
    num_counters = flat[0].numel()
    scratch = torch.empty(min(chunk, num_counters), dtype=torch.int64, device=device)
    for start in range(0, num_counters, chunk):
        piece = slice(start, start + chunk)
        round_keys = [word if isinstance(word, int) else word[piece] for word in keys]
        parts = [word[piece] for word in flat]
        _encrypt(parts, round_keys, scratch[: parts[0].numel()])
    # Each round renames the words by one place, and ten rounds by two places beyond full circles.
    return words[2], words[3], words[0], words[1]


def _shape_and_device(words: Sequence[Tensor | int]) -> tuple[torch.Size, torch.device]:
    tensors = [word for word in words if isinstance(word, Tensor)]
    for word in words:
        if isinstance(word, Tensor) and (word.is_floating_point() or word.is_complex() or word.dtype == torch.bool):
            raise TypeError(f"a Philox word is an integer tensor, not {word.dtype}")
        if not isinstance(word, Tensor | int):
            raise TypeError(f"a Philox word is an int or an integer tensor, not {type(word).__name__}")
    shape = torch.Size([])
    if tensors:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    return shape, tensors[0].device if tensors else torch.device("cpu")


def _filled(word: Tensor | int, shape: torch.Size, device: torch.device) -> Tensor:
    """A fresh contiguous int64 tensor of the broadcast shape, reduced to 32 bits."""
    if isinstance(word, int):
        return torch.full(shape, word & _MASK_32, dtype=torch.int64, device=device)
    full = torch.empty(shape, dtype=torch.int64, device=device)
    return full.copy_(word.expand(shape)).bitwise_and_(_MASK_32)


def _scalar_or_view(word: Tensor | int, shape: torch.Size, device: torch.device) -> Tensor:
    """The word as int64, without memory for each element; a kernel must not be compiled anew for each number."""
    if isinstance(word, int):
        return torch.full((), word & _MASK_32, dtype=torch.int64, device=device).expand(shape)
    return word.to(torch.int64).expand(shape)


def rounds(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, key_0: Tensor, key_1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on int64 tensors of one shape, as a formula that a compiler makes one kernel of."""
    a, b, c, d = a & _MASK_32, b & _MASK_32, c & _MASK_32, d & _MASK_32
    key_0, key_1 = key_0 & _MASK_32, key_1 & _MASK_32
    for _ in range(_ROUNDS):
        product_0, product_1 = a * _MULTIPLIER_0, c * _MULTIPLIER_1
        a, b = (product_1 >> 32 & _MASK_32) ^ b ^ key_0, product_1 & _MASK_32
        c, d = (product_0 >> 32 & _MASK_32) ^ d ^ key_1, product_0 & _MASK_32
        key_0, key_1 = (key_0 + _KEY_STEP_0) & _MASK_32, (key_1 + _KEY_STEP_1) & _MASK_32
    return a, b, c, d


def _encrypt(words: list[Tensor], key: list[Tensor | int], scratch: Tensor) -> None:
    """Ten rounds in place; leaves the output words in the order (2, 3, 0, 1).

    A product wraps modulo 2^64 in int64, which keeps both of its 32-bit halves.
    The low halves keep their upper bits until the next round masks them: only factors must be below 2^32.
    """
    a, b, c, d = words
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        a.mul_(_MULTIPLIER_0)
        c.mul_(_MULTIPLIER_1)
        torch.bitwise_right_shift(c, 32, out=scratch)
        b.bitwise_xor_(scratch).bitwise_xor_(key_0).bitwise_and_(_MASK_32)
        torch.bitwise_right_shift(a, 32, out=scratch)
        d.bitwise_xor_(scratch).bitwise_xor_(key_1).bitwise_and_(_MASK_32)
        a, b, c, d = b, c, d, a
        key_0 = (key_0 + _KEY_STEP_0) & _MASK_32
        key_1 = (key_1 + _KEY_STEP_1) & _MASK_32
    b.bitwise_and_(_MASK_32)
    d.bitwise_and_(_MASK_32)


def run_key(seed: int) -> tuple[int, int]:
    """The run key (seed mod 2^32, seed div 2^32) of a 64-bit seed.

    Raises:
        ValueError: when the seed is outside [0, 2^64).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"a seed is in [0, 2^64), not {seed}")
    return seed & _MASK_32, seed >> 32


def uniform_words(
    index: Tensor,
    num_positions: int,
    *,
    purpose: Purpose,
    key: tuple[int, int],
    draw: int = 0,
    first_position: int = 0,
) -> Tensor:
    """u_pos of the noise law: word[pos mod 4] of philox((i_lo, i_hi, pos div 4, purpose + 256*draw), key).

    Args:
        index: [b] int64, the global sample index (validation row for the validation purposes), not negative.
        num_positions: how many positions to make.
        purpose: what the words decide.
        key: the run key.
        draw: 0 for the single view and the pair; independent views, replicates and denoising steps count up.
        first_position: the first position made; a slice's bits equal the same slice of the full tensor.

    Returns:
        [b, num_positions] int64 words in [0, 2^32).

    Raises:
        ValueError: for a draw outside [0, 2^24) or a negative position.
    """
    if not 0 <= draw < _MAX_DRAW:
        raise ValueError(f"draw is {draw}; allowed: 0 to {_MAX_DRAW - 1}")
    if first_position < 0 or num_positions < 0:
        raise ValueError(f"positions are not negative: first_position={first_position}, num_positions={num_positions}")
    first_word = first_position // 4
    last_word = -(-(first_position + num_positions) // 4)
    words = torch.arange(first_word, last_word, dtype=torch.int64, device=index.device)
    low, high = index & _MASK_32, index >> 32
    made = philox4x32((low[:, None], high[:, None], words[None, :], int(purpose) + 256 * draw), key)
    offset = first_position - 4 * first_word
    return torch.stack(made, dim=-1).flatten(1)[:, offset : offset + num_positions].contiguous()
