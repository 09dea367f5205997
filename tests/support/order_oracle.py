"""The order law again, slowly, in plain Python integers: shares no code with the package."""

from __future__ import annotations

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011), one counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _MASK, (first >> 32) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _sorted_by_words(indices: list[int], epoch: int, purpose: int, key: tuple[int, int]) -> list[int]:
    def words(index: int) -> tuple[int, int, int]:
        word = philox4x32_10((index & _MASK, index >> 32, epoch, purpose), key)
        return word[0], word[1], index

    return sorted(indices, key=words)


def epoch_rows(block_rows: list[int], epoch: int, key: tuple[int, int], window: int) -> list[int]:
    """Every row of one epoch, in order."""
    first = [sum(block_rows[:block]) for block in range(len(block_rows))]
    blocks = _sorted_by_words(list(range(len(block_rows))), epoch, 11, key)
    rows: list[int] = []
    for start in range(0, len(blocks), window):
        members = [
            first[block] + place for block in blocks[start : start + window] for place in range(block_rows[block])
        ]
        rows += _sorted_by_words(members, epoch, 12, key)
    return rows


def draw_rows(block_rows: list[int], start: int, count: int, key: tuple[int, int], window: int) -> list[int]:
    """Rows of the draws start, ..., start + count - 1."""
    n = sum(block_rows)
    epochs = {e: epoch_rows(block_rows, e, key, window) for e in range(start // n, (start + count) // n + 1)}
    return [epochs[k // n][k % n] for k in range(start, start + count)]
