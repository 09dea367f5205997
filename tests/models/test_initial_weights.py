"""Initial weights: the law to the bit, the same for every slice, with the promised moments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import megamask.models.initial_weights as module
from megamask.models.initial_weights import initial_tensor, standard_deviation, sum_of_twelve
from megamask.models.shapes import canonical_shapes, canonical_tensors
from megamask.storage.hashing import hash_of, key_of
from support import noise_oracle
from support.specs import small_spec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "weights_v1.json").read_text())
SPEC = small_spec(qk_norm=True, qkv_bias=True)
QUERY = "model.layers.1.self_attn.q_proj.weight"


def edges(size: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: slice(min(pair), max(pair)))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['seed']} {case['name']}")
def test_sums_of_twelve_equal_the_golden_integers(case: dict[str, object]) -> None:
    key = key_of(hash_of(int(str(case["seed"])), case["name"]))
    assert sum_of_twelve(torch.tensor(case["elements"]), key).tolist() == case["sums"]


@pytest.mark.promise("initial weights follow the noise law, and a slice equals the same slice of the full tensor")
@given(
    seed=st.integers(0, 2**64 - 1),
    name=st.sampled_from([name for name, shape in canonical_shapes(SPEC).items() if len(shape) == 2]),
    place=st.integers(0, 10**9),
)
def test_values_equal_the_law_in_plain_integers(seed: int, name: str, place: int) -> None:
    rows, columns = canonical_shapes(SPEC)[name]
    row, column = divmod(place % (rows * columns), columns)
    std = 0.02 / math.sqrt(2 * 2) if ("o_proj" in name or "down_proj" in name) else 0.02
    z = (noise_oracle.sum_of_twelve(seed, name, row * columns + column) - 393210) / math.sqrt(65536**2 - 1)
    made = initial_tensor(seed, name, SPEC, (slice(row, row + 1), slice(column, column + 1)))
    assert made.tolist() == [[float(np.float32(z * std))]]


@pytest.mark.promise("initial weights follow the noise law, and a slice equals the same slice of the full tensor")
@given(rows=edges(48), columns=edges(48))
def test_values_of_a_slice_equal_the_slice_of_the_whole(rows: slice, columns: slice) -> None:
    whole = initial_tensor(3, QUERY, SPEC)
    assert torch.equal(initial_tensor(3, QUERY, SPEC, (rows, columns)), whole[rows, columns])
    norm = initial_tensor(3, "model.norm.weight", SPEC, (rows,))
    assert torch.equal(norm, torch.ones(rows.stop - rows.start))


def test_values_are_equal_when_they_are_made_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = initial_tensor(3, QUERY, SPEC)
    monkeypatch.setattr(module, "_ELEMENTS_AT_A_TIME", 37)
    assert torch.equal(initial_tensor(3, QUERY, SPEC), whole)


def test_moments_are_those_of_the_law_within_one_in_a_billion() -> None:
    # A sum of uniforms is sub-Gaussian with its own variance, so a mean strays 7 standard errors less than once in
    # 2 * 10^10; the mean of 240,000 squares is normal enough for the same figure with ample room. The square of z has
    # variance 2 - 0.1 (excess kurtosis of twelve uniforms: -1.2 / 12).
    spec = small_spec(vocab_size=5000)
    z = initial_tensor(1, "lm_head.weight", spec).double() / 0.02
    n = z.numel()
    assert abs(float(z.mean())) < 7 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 7 * math.sqrt(1.9 / n)
    assert float((z**4).mean()) == pytest.approx(2.9, abs=0.1)
    assert float(z.abs().max()) <= 393210 / math.sqrt(65536**2 - 1)
    neighbours = (z[:, 1:] * z[:, :-1]).mean()
    assert abs(float(neighbours)) < 7 / math.sqrt(n)


@pytest.mark.parametrize("layers", [1, 8])
def test_projections_to_the_residual_stream_shrink_with_depth(layers: int) -> None:
    spec = small_spec(num_layers=layers, init_std=0.1)
    tensors = canonical_tensors(spec)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}.weight"
        assert standard_deviation(tensors[name], spec) == 0.1 / math.sqrt(2 * layers)
        assert float(initial_tensor(1, name, spec).std()) == pytest.approx(0.1 / math.sqrt(2 * layers), rel=0.1)
    for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert standard_deviation(tensors[f"model.layers.0.{part}.weight"], spec) == 0.1
    assert standard_deviation(tensors["model.embed_tokens.weight"], spec) == 0.1


def test_norms_are_one_and_biases_are_zero() -> None:
    for name, shape in canonical_shapes(SPEC).items():
        made = initial_tensor(1, name, SPEC)
        assert (made.shape, made.dtype) == (shape, torch.float32)
        if "norm" in name:
            assert bool((made == 1).all())
        elif name.endswith("bias"):
            assert bool((made == 0).all())
        else:
            assert float(made.std()) > 0.005


def test_seeds_and_names_give_different_weights() -> None:
    other = QUERY.replace("layers.1", "layers.0")
    first = initial_tensor(1, QUERY, SPEC)
    assert not torch.equal(first, initial_tensor(2, QUERY, SPEC))
    assert not torch.equal(first, initial_tensor(1, other, SPEC))


def test_weights_do_not_change_when_only_the_padding_does() -> None:
    narrow, wide = small_spec(vocab_padding_multiple=1), small_spec(vocab_padding_multiple=64)
    assert canonical_shapes(narrow) == canonical_shapes(wide)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(initial_tensor(1, name, narrow), initial_tensor(1, name, wide))


def test_canonical_shapes_follow_the_options() -> None:
    plain, tied = canonical_shapes(small_spec()), canonical_shapes(small_spec(tie_embeddings=True))
    assert set(plain) - set(tied) == {"lm_head.weight"}
    extra = {name.split(".", 3)[3] for name in set(canonical_shapes(SPEC)) - set(plain)}
    assert extra == {
        f"self_attn.{part}" for part in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight")
    }
    assert plain["model.layers.1.self_attn.k_proj.weight"] == (24, 48)
    assert plain["model.embed_tokens.weight"] == (101, 48)


def test_initial_tensor_refuses_unknown_names_and_other_indices() -> None:
    with pytest.raises(ValueError, match=r"no canonical tensor model\.layers\.2"):
        initial_tensor(1, "model.layers.2.input_layernorm.weight", SPEC)
    for index in ((slice(0, 2),), (slice(0, 4, 2), slice(None))):
        with pytest.raises(ValueError, match="slice of step 1"):
            initial_tensor(1, QUERY, SPEC, index)
