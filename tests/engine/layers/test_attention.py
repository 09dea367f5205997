"""Positions and attention pattern are inputs: the engine does with them what the reference network does."""

from __future__ import annotations

import pytest
import torch

from megamask.engine.layers.attention import attend
from megamask.models.context import Causal, Context
from support import context_worker as worker
from support import engine_cases as cases
from support.engine_cases import OPTIONS, PLAIN

pytestmark = pytest.mark.multiprocess

every_context = pytest.mark.parametrize("name", worker.CONTEXTS)


@pytest.mark.promise("the engine carries out positions, documents and attention patterns as the reference network does")
@every_context
@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
def test_hidden_states_and_gradients_are_the_reference_networks(build, spec, name):
    engine, model = build(spec), cases.reference(spec)
    context, inputs = worker.CONTEXTS[name], worker.inputs()
    hidden, expected = engine._rank_model.network.encode(inputs, context).transpose(0, 1), model(inputs, context)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    engine._optimizer.zero_gradients()
    (hidden * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = cases.canonical_gradients(engine)
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=2e-5 * float(gradient.abs().max()))


@pytest.mark.promise("under causal attention no position sees a later one, and packed documents do not see each other")
def test_later_tokens_change_nothing_before_them_under_causal_attention(build):
    network = build(OPTIONS)._rank_model.network
    inputs = worker.inputs()
    changed = inputs.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 58
    with torch.no_grad():
        for context, is_kept in ((Context(pattern=Causal()), True), (Context(), False)):
            one, two = (network.encode(ids, context) for ids in (inputs, changed))
            assert torch.equal(one[:10], two[:10]) == is_kept
            assert not torch.equal(one[10:], two[10:])


@pytest.mark.promise("under causal attention no position sees a later one, and packed documents do not see each other")
@pytest.mark.parametrize("name", ["documents", "causal documents"])
def test_packed_documents_are_computed_as_rows_of_their_own(build, name):
    network, context = build(OPTIONS)._rank_model.network, worker.CONTEXTS[name]
    row = worker.inputs()[1:]
    with torch.no_grad():
        packed = network.encode(row, context.rows(slice(1, 2)))
        alone = [network.encode(part, Context(pattern=context.pattern)) for part in (row[:, :5], row[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_positions_in_order_have_the_bits_of_no_positions(build):
    network, inputs = build(PLAIN)._rank_model.network, worker.inputs()
    in_order = torch.arange(worker.LENGTH).expand(worker.NUM_ROWS, worker.LENGTH)
    with torch.no_grad():
        assert torch.equal(network.encode(inputs), network.encode(inputs, Context(positions=in_order)))


def test_a_mask_beside_the_context_is_refused(build):
    network = build(PLAIN)._rank_model.network
    with pytest.raises(ValueError, match="RowContext"):
        network(input_ids=worker.inputs(), position_ids=None, attention_mask=torch.ones(1, dtype=torch.bool))


@pytest.mark.promise("queries that share keys and values attend as those with a copy each")
def test_shared_keys_give_the_outputs_of_repeated_ones_bit_for_bit():
    generator = torch.Generator().manual_seed(5)
    query, upstream = (torch.randn(2, 6, 300, 16, generator=generator) for _ in range(2))
    key, value = (torch.randn(2, 2, 300, 16, generator=generator) for _ in range(2))
    found = []
    for shares_keys in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attend(*leaves, mask=None, is_causal=False, scale=0.25, shares_keys=shares_keys)
        output.backward(upstream)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for shared, repeated in list(zip(*found, strict=True))[:2]:  # the output and the queries' gradient
        assert torch.equal(shared, repeated)
    for shared, repeated in list(zip(*found, strict=True))[2:]:  # those of keys and values are sums in another order
        torch.testing.assert_close(shared, repeated, rtol=1e-5, atol=1e-5)


def test_shared_keys_are_never_copied(monkeypatch):
    def refuse(*unused, **options):
        raise AssertionError("keys or values were repeated")

    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", refuse)
    attend(query, key, key, mask=None, is_causal=False, scale=1.0, shares_keys=True)
    with pytest.raises(AssertionError, match="repeated"):
        attend(query, key, key, mask=None, is_causal=True, scale=1.0, shares_keys=True)
