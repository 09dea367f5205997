"""The reference network equals Hugging Face's Llama, Qwen2 and Qwen3 with full and with causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from megamask.models.context import Causal, Context
from megamask.models.initial_weights import initial_tensor
from megamask.models.reference import ReferenceModel
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from support.specs import small_spec, vocabulary_of

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaModel, {}),
    "llama, one group": (LlamaConfig, LlamaModel, {"num_query_groups": 1, "head_dim": 16, "rope_theta": 5e5}),
    "qwen2": (Qwen2Config, Qwen2Model, {"qkv_bias": True}),
    "qwen3": (Qwen3Config, Qwen3Model, {"qk_norm": True, "head_dim": 20, "norm_eps": 1e-3}),
}


def random_network(spec: ModelSpec) -> ReferenceModel:
    """Random in every parameter, norms and biases too: values that initialisation leaves trivial would hide errors."""
    network = ReferenceModel(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return network


def twin(spec: ModelSpec, config: Any, model: Any, network: ReferenceModel) -> Any:
    """The Hugging Face model with the same weights."""
    extra = {} if config is Qwen2Config else {"head_dim": spec.head_dim}
    other = model(
        config(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.ffn_hidden_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_attention_heads,
            num_key_value_heads=spec.num_query_groups,
            rms_norm_eps=spec.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
            attn_implementation="eager",
            pad_token_id=None,
            **extra,
        )
    )
    weights = {name.removeprefix("model."): value for name, value in network.state_dict().items()}
    weights.pop("lm_head.weight", None)
    other.load_state_dict(weights, strict=True)
    return other.eval()


@pytest.mark.promise("the reference network equals the Hugging Face implementation")
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_the_hugging_face_model(family: str) -> None:
    config, model, changes = FAMILIES[family]
    spec = small_spec(**changes)
    network = random_network(spec)
    x_t = torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(2))
    full_attention = torch.zeros(3, 1, 17, 17)
    with torch.no_grad():
        expected = twin(spec, config, model, network)(input_ids=x_t, attention_mask=full_attention).last_hidden_state
        torch.testing.assert_close(network(x_t), expected, rtol=2e-6, atol=4e-6)
        causal = twin(spec, config, model, network)(input_ids=x_t).last_hidden_state
        torch.testing.assert_close(network(x_t, Context(pattern=Causal())), causal, rtol=2e-6, atol=4e-6)
    assert float((expected - causal).detach().abs().max()) > 0.1  # so the mask above did make a difference


def test_every_position_sees_every_other() -> None:
    network = random_network(small_spec())
    x_t = torch.arange(12)[None]
    for changed in (0, 11):
        other = x_t.clone()
        other[0, changed] = 50
        assert bool(((network(x_t) - network(other)).abs().amax(dim=-1) > 1e-6).all())


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    network = random_network(small_spec())
    x_t = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(network(x_t)[1:], network(x_t[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": True, "qkv_bias": True}])
def test_state_dict_has_exactly_the_canonical_names(changes: dict[str, bool]) -> None:
    spec = small_spec(**changes)
    state = ReferenceModel(spec).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(canonical_shapes(spec))


def test_initialize_sets_the_initial_weights_of_the_law() -> None:
    network = ReferenceModel(small_spec())
    network.initialize(5)
    for name, value in network.state_dict().items():
        assert torch.equal(value, initial_tensor(5, name, network.spec))


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    ReferenceModel(small_spec()).initialize(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_exclude_the_ids_that_are_named() -> None:
    network = random_network(small_spec())
    vocabulary = vocabulary_of(network.spec)
    hidden = network(torch.arange(10)[None])
    excluded = network.logits(hidden, excluded_ids=frozenset((vocabulary.mask_token_id,)))
    included = network.logits(hidden)
    assert excluded.shape == (1, 10, 101)
    assert bool(torch.isneginf(excluded[..., vocabulary.mask_token_id]).all())
    others = torch.arange(101) != vocabulary.mask_token_id
    assert torch.equal(excluded[..., others], included[..., others])
    assert bool(torch.isfinite(included).all())
    torch.testing.assert_close(included, hidden @ network.lm_head.weight.T)


def test_tied_head_scores_with_the_embedding() -> None:
    network = random_network(small_spec(tie_embeddings=True))
    hidden: Tensor = network(torch.arange(4)[None])
    logits = network.logits(hidden[0, :2])
    torch.testing.assert_close(logits, hidden[0, :2] @ network.model.embed_tokens.weight.T)
