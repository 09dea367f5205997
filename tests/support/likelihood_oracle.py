"""The likelihood law again, slowly, in plain Python integers: shares no code with the package."""

from __future__ import annotations

from support.order_oracle import philox4x32_10

_MASK = 0xFFFFFFFF


def counts(row: int, n: int, *, draws: int, replicate: int, seed: int) -> list[int]:
    """k_0, ..., k_(draws-1) of a row with n eligible tokens."""
    key = (seed & _MASK, seed >> 32)
    word = philox4x32_10((row & _MASK, row >> 32, 0, 10 + 256 * replicate), key)[0]
    k = 1 + word * n // 2**32
    return [(k - 1 + member * n // draws) % n + 1 for member in range(draws)]


def masked_positions(row: int, eligible: list[int], count: int, *, draw: int, seed: int) -> list[int]:
    """The positions that a draw masks, ascending."""
    key = (seed & _MASK, seed >> 32)

    def word(position: int) -> int:
        return philox4x32_10((row & _MASK, row >> 32, position // 4, 9 + 256 * draw), key)[position % 4]

    return sorted(sorted(eligible, key=lambda position: (word(position), position))[:count])


def golden_cases() -> list[dict[str, object]]:
    """The vectors of tests/golden/likelihood_v1.json."""
    cases: list[dict[str, object]] = []
    for seed, row, length, padding, draws, replicate in [
        (1, 0, 16, 0, 4, 0),
        (1, 1, 16, 0, 4, 1),
        (1, 2, 16, 5, 3, 2),
        (2**63 + 12345, 2**33 + 7, 32, 1, 8, 3),
        (0, 5, 8, 7, 5, 0),
    ]:
        n = length - padding
        chosen = counts(row, n, draws=draws, replicate=replicate, seed=seed)
        masks = [
            masked_positions(row, list(range(n)), k, draw=replicate * draws + member, seed=seed)
            for member, k in enumerate(chosen)
        ]
        cases.append(
            {
                "seed": str(seed),
                "row": row,
                "length": length,
                "num_eligible": n,
                "draws": draws,
                "replicate": replicate,
                "counts": chosen,
                "masked": masks,
            }
        )
    return cases
