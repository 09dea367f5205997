"""Rules between the sizes of a network."""

from __future__ import annotations

from collections.abc import Iterator

from megamask.config.rules.problem import Problem, divisors, listed


def effective_query_groups(num_attention_heads: int, num_query_groups: int | None) -> int:
    """Key and value heads of each layer: by default one for each query head."""
    return num_attention_heads if num_query_groups is None else num_query_groups


def effective_head_dim(hidden_size: int, num_attention_heads: int, head_dim: int | None) -> int:
    """Channels of a head: by default an equal share of the width; `model_problems` finds a share that is not equal."""
    return hidden_size // num_attention_heads if head_dim is None else head_dim


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def model_problems(
    *,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int | None,
    head_dim: int | None,
    rotary_fraction: float = 1.0,
) -> Iterator[Problem]:
    """Sizes of the model section that contradict one another; all are positive, None means the default."""
    groups = effective_query_groups(num_attention_heads, num_query_groups)
    if num_attention_heads % groups != 0:
        yield Problem(
            key="model.num_query_groups",
            because=f"but model.num_attention_heads is {num_attention_heads}",
            allowed=listed(divisors(num_attention_heads)),
        )
    if head_dim is None and hidden_size % num_attention_heads != 0:
        yield Problem(
            key="model.num_attention_heads",
            because=f"but model.hidden_size is {hidden_size} and model.head_dim is null",
            allowed=f"{listed(divisors(hidden_size))}; or set model.head_dim",
        )
    elif (channels := effective_head_dim(hidden_size, num_attention_heads, head_dim)) % 2 != 0:
        # rotary positions turn pairs of channels
        yield (
            Problem(
                key="model.hidden_size",
                because=f"which gives {num_attention_heads} heads of {channels} channels; rotary positions need pairs",
                allowed=f"a multiple of {2 * num_attention_heads}; or set an even model.head_dim",
            )
            if head_dim is None
            else Problem(key="model.head_dim", because="but rotary positions need pairs", allowed="an even number")
        )
    channels = effective_head_dim(hidden_size, num_attention_heads, head_dim)
    if channels % 2 == 0 and not is_even(channels * rotary_fraction):
        yield Problem(
            key="model.rotary_fraction",
            because=f"but a head has {channels} channels, and rotary positions need pairs",
            allowed=f"a multiple of {2 / channels:g}",
        )


def is_even(number: float) -> bool:
    """True if a number is an even integer above 0."""
    return number > 0 and number % 2 == 0
