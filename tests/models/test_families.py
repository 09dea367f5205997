import dataclasses
import json

import pytest
import torch

from megamask.conversion.hub_folder import HubFolder
from megamask.conversion.name_map import NameMap
from megamask.errors import UsageError
from megamask.models.experts import ExpertSpec
from megamask.models.families.base import TokenIds
from megamask.models.families.numbers import rope_theta
from megamask.models.families.registry import FAMILIES, REFUSED, family_named, family_of, plain_family
from megamask.models.reference import ReferenceModel
from megamask.models.shapes import canonical_shapes
from support.hub_models import LLADA2, VOCABULARY, full_logits, save_hub_folder, twin_model
from support.llada2_reference import SIZES
from support.specs import small_spec


def _network(folder):
    hub = HubFolder(folder)
    family = family_of(hub.config)
    names = NameMap.of_folder(hub, family)
    network = ReferenceModel(names.spec)
    network.load_state_dict({name: names.tensor(hub, name).float() for name in canonical_shapes(names.spec)})
    return family, network.eval()


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.promise("A published model's logits are those of transformers within 1e-5, family by family")
def test_logits_equal_those_of_transformers(tmp_path, name):
    expected_model = save_hub_folder(tmp_path, name)
    family, network = _network(tmp_path)
    assert family.name == name
    tokens = torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))
    expected = full_logits(expected_model, tokens)
    with torch.no_grad():
        hidden = network(tokens)
        head = network.model.embed_tokens if network.spec.tie_embeddings else network.lm_head
        logits = hidden @ head.weight.T
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def _spec(name):
    """A network of the family."""
    if name == LLADA2:
        return FAMILIES[name].spec(SIZES)
    return FAMILIES[FAMILIES[name].plain_twin or name].spec(twin_model(name).config.to_dict())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_config_reads_back_what_it_wrote(name):
    family, spec = FAMILIES[name], _spec(name)
    document = json.loads(json.dumps(family.config(spec, family.ids, block_size=8)))
    assert family_of(document) is family
    assert family.spec(document) == spec
    assert family.block_size(document) == (8 if family.keys.block_size else None)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_plain_twin_holds_the_networks_of_its_family(name):
    twin = FAMILIES[name].plain_twin
    if twin is not None:
        assert plain_family(_spec(name)).name == twin
        assert FAMILIES[twin].attention == "causal"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta"),
        ({"rope_theta": 1e4}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads"),
    ],
)
@pytest.mark.promise("A config.json that asks for what the network cannot do is refused, with the key named")
def test_spec_names_the_key_that_does_not_fit(change, named):
    config = twin_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | change
    with pytest.raises(UsageError, match=named.replace(".", r"\.")):
        family_of(config).spec(config)


def test_rope_theta_is_read_from_either_place():
    assert rope_theta({"rope_theta": 7.0}) == 7.0
    assert rope_theta({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}) == 7.0


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_family_of_gives_the_reason_for_a_known_architecture(architecture):
    with pytest.raises(UsageError, match=f"{architecture} is not supported, because it has"):
        family_of({"architectures": [architecture]})


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3]])
def test_family_of_refuses_a_config_without_architecture(value):
    with pytest.raises(UsageError, match="architectures is"):
        family_of({"architectures": value})


def test_token_ids_come_from_the_config_then_from_the_published_models():
    llada = FAMILIES["llada"]
    assert llada.token_ids({"embedding_size": 126464}).mask == 126336
    assert llada.token_ids({"embedding_size": 126464, "mask_token_id": 7}).mask == 7
    assert llada.token_ids({"embedding_size": 100}).mask is None
    assert FAMILIES["llama"].token_ids({"vocab_size": 100, "eos_token_id": [3, 4]}).eos == 3
    with pytest.raises(UsageError, match="pad_token_id is 100"):
        FAMILIES["llama"].token_ids({"vocab_size": 100, "pad_token_id": 100})


def test_plain_family_is_chosen_by_norms_and_biases():
    for name in ("llama", "qwen2", "qwen3_moe", "qwen3"):
        spec = FAMILIES[name].spec(twin_model(name).config.to_dict())
        assert plain_family(spec).name == name
    with pytest.raises(UsageError, match=r"model\.qk_norm"):
        FAMILIES["qwen2"].config(spec, FAMILIES["qwen2"].ids)
    with pytest.raises(UsageError, match="--family is 'gpt'"):
        family_named("gpt")


def test_network_that_no_family_can_hold_is_refused_by_export():
    experts = ExpertSpec(num_experts=4, topk=2, ffn_hidden_size=16)
    plain = FAMILIES["llama"]
    for changes, reason in (
        ({"experts": experts}, "has experts"),
        ({"rotary_fraction": 0.5}, r"model\.rotary_fraction"),
    ):
        with pytest.raises(UsageError, match=reason):
            plain.config(dataclasses.replace(small_spec(), **changes), TokenIds(mask=1, pad=3))
    with pytest.raises(UsageError, match="no experts, family qwen3_moe needs them"):
        FAMILIES["qwen3_moe"].config(dataclasses.replace(small_spec(), qk_norm=True), TokenIds())
    with pytest.raises(UsageError, match=r"model\.qk_norm False, model\.qkv_bias False and experts"):
        plain_family(dataclasses.replace(small_spec(), experts=experts, qk_norm=False))
