from __future__ import annotations

import pytest
import torch

from megamask.diffusion.sampling import Draw
from megamask.generation.predictor import ReferencePredictor
from support import engine_cases as cases
from support import preview_worker as worker
from support.engine_cases import OPTIONS, PLAIN


@pytest.mark.promise("every layout's preview equals the reference network's text, greedy and with temperature")
@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_predictions_are_the_reference_networks_choice_at_every_open_position(build, spec, temperature):
    """Five rows in passes of two or four: the last pass is filled up, and one row has nothing open."""
    x_t, _, is_masked = cases.probe_rows(5, spec)
    draw = Draw(step=3, sequences=(7, 0, 2**33, 5, 6), seed=2**40 + 1, temperature=temperature)
    found = build(spec, micro_batch_size=2).predict(cases.reading(x_t, is_masked), draw)
    expected = ReferencePredictor(network=cases.reference(spec), vocabulary=cases.vocabulary(spec))(
        cases.reading(x_t, is_masked), draw
    )
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.confidence.tolist() == pytest.approx(expected.confidence.tolist(), rel=1e-5)
    assert found.confidence.dtype == torch.float64


@pytest.mark.promise("padding and the mask token are never chosen and have no probability")
def test_mask_and_padding_are_never_chosen_and_have_no_probability(build):
    """Their logits are made the largest by far; the probabilities of the others still add up to one."""
    engine, vocabulary = build(), cases.vocabulary(PLAIN)
    x_t, _, is_masked = cases.probe_rows(3, PLAIN)
    draw = Draw(step=1, sequences=(0, 1, 2))
    before = engine.predict(cases.reading(x_t, is_masked), draw)
    weight = engine._rank_model.network.output_layer.weight
    with torch.no_grad():
        for token in (vocabulary.mask_token_id, vocabulary.pad_token_id, vocabulary.padded_vocab_size - 1):
            weight[token] = 1000 * weight[:50].sum(dim=0)
    after = engine.predict(cases.reading(x_t, is_masked), draw)
    assert after.tokens.tolist() == before.tokens.tolist()
    assert after.confidence.tolist() == before.confidence.tolist()
    assert max(before.confidence) < 0.5


@pytest.mark.promise("bf16 predictions equal the reference network's up to rounding")
def test_bf16_predicts_as_the_reference_network_up_to_its_rounding(build):
    """A bf16 number has 8 bits: the logits of this network, below 1, are off by some thousandths."""
    x_t, _, is_masked = cases.probe_rows(5, PLAIN)
    draw = Draw(step=1, sequences=(0, 1, 2, 3, 4), temperature=1.0)
    found = build(micro_batch_size=2, compute="bf16").predict(cases.reading(x_t, is_masked), draw)
    reference = ReferencePredictor(network=cases.reference(PLAIN), vocabulary=cases.vocabulary(PLAIN))
    expected = reference(cases.reading(x_t, is_masked), draw)
    is_same = found.tokens == expected.tokens
    assert float(is_same.double().mean()) > 0.9
    assert found.confidence[is_same].tolist() == pytest.approx(expected.confidence[is_same].tolist(), rel=0.03)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_previews_between_steps_leave_training_bit_identical(build, compute):
    def run(is_previewing):
        engine = build(micro_batch_size=2, compute=compute)
        fields = []
        for step in (1, 2, 3):
            if is_previewing:
                worker.decoded(engine.predict, PLAIN, 1.0)
            fields.append(cases.report_fields(cases.take_step(engine, step)))
        return fields, engine.parameter_digest()

    assert run(is_previewing=True) == run(is_previewing=False)
