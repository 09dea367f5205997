"""From the config's model section to a checked network: defaults, refusals that name the key, a lossless round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.errors import ExitCode, UsageError
from megamask.models.spec import ModelSpec
from support.specs import small_config, small_spec


def test_spec_resolves_the_defaults_of_the_config() -> None:
    spec = small_spec(num_query_groups=None)
    assert (spec.num_query_groups, spec.head_dim) == (4, 12)
    assert (spec.vocab_size, spec.padded_vocab_size, spec.max_sequence_length) == (101, 128, 32)
    assert small_spec(head_dim=16).head_dim == 16


@given(vocab_size=st.integers(1, 10_000), multiple=st.integers(1, 300))
def test_padding_is_the_next_multiple(vocab_size: int, multiple: int) -> None:
    padded = small_spec(vocab_size, vocab_padding_multiple=multiple).padded_vocab_size
    assert padded % multiple == 0
    assert 0 <= padded - vocab_size < multiple


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_query_groups": 3}, r"model\.num_query_groups is 3, .*num_attention_heads is 4; allowed: 1, 2, 4\. "),
        (
            {"num_attention_heads": 5, "num_query_groups": None},
            r"model\.num_attention_heads is 5, .* is 48 .*; allowed: 1, 2",
        ),
        ({"head_dim": 7}, r"model\.head_dim is 7, but rotary positions need pairs; allowed: an even number"),
        ({"num_attention_heads": 16}, r"model\.hidden_size is 48, which gives 16 heads of 3 channels; rotary"),
        ({"num_layers": 0}, r"model\.num_layers is 0; allowed: >= 1"),
        ({"rope_theta": float("inf")}, r"model\.rope_theta is inf; allowed: a number > 0"),
        ({"init_std": float("nan")}, r"model\.init_std is nan; allowed: a number > 0"),
    ],
)
def test_spec_refuses_numbers_that_do_not_fit_and_names_the_key(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        small_spec(**changed)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "Nothing was built." in caught.value.message
    assert caught.value.hint is not None


def test_spec_lets_heads_not_divide_the_width_when_head_dim_is_given() -> None:
    assert small_spec(num_attention_heads=5, num_query_groups=5, head_dim=8).head_dim == 8


@given(
    layers=st.integers(1, 100),
    theta=st.floats(1.0, 1e9),
    eps=st.floats(1e-12, 1.0),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    vocab_size=st.integers(1, 200_000),
)
def test_spec_survives_json(
    layers: int, theta: float, eps: float, flags: tuple[bool, bool, bool], vocab_size: int
) -> None:
    names = dict(zip(("qk_norm", "qkv_bias", "tie_embeddings"), flags, strict=True))
    spec = small_spec(vocab_size, num_layers=layers, rope_theta=theta, norm_eps=eps, **names)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False))) == spec


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": "2"}, "model field num_layers is '2'; allowed: int"),
        ({"num_layers": True}, "model field num_layers is True; allowed: int"),
        ({"qk_norm": 1}, "model field qk_norm is 1; allowed: bool"),
        ({"rope_theta": None}, "model field rope_theta is None; allowed: float"),
        ({"depth": 2}, "model fields differ: depth"),
    ],
)
def test_spec_refuses_json_of_another_shape(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_json(small_spec().to_json() | changed)


def test_spec_refuses_json_that_lacks_a_field() -> None:
    value = small_spec().to_json()
    del value["head_dim"]
    with pytest.raises(ValueError, match="model fields differ: head_dim"):
        ModelSpec.from_json(value)


def test_whole_numbers_in_json_read_as_real_ones() -> None:
    value = small_spec(rope_theta=10000.0).to_json() | {"rope_theta": 10000}
    assert type(ModelSpec.from_json(value).rope_theta) is float
    assert small_config().rope_theta == 10000.0
