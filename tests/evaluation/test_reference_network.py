from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megamask.errors import UsageError
from megamask.evaluation import reference_network
from megamask.evaluation.objective import refuse_leaks
from megamask.evaluation.reference_network import ReferenceScore
from megamask.models.experts import ExpertSpec
from megamask.models.reference import ReferenceModel
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import scored_rows, softmax_without
from support.model_documents import model_document
from support.objectives import masked_objective

SPEC, VOCABULARY = model_document().spec, model_document().vocabulary


def test_experts_that_choose_tokens_are_not_scored_as_if_they_saw_no_future() -> None:
    experts = ExpertSpec(num_experts=4, topk=2, ffn_hidden_size=8, choice="experts")
    causal = AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded")
    with pytest.raises(UsageError, match=r"model.router_choice=experts.*Nothing was scored"):
        refuse_leaks(replace(SPEC, experts=experts), causal)
    refuse_leaks(replace(SPEC, experts=experts), masked_objective(VOCABULARY))
    refuse_leaks(replace(SPEC, experts=replace(experts, choice="tokens")), causal)


@pytest.fixture(scope="module")
def network() -> ReferenceModel:
    network = ReferenceModel(SPEC)
    network.initialize(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)  # initial weights give nearly uniform logits, which would hide mistakes
    return network.eval()


def _rows(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.randint(0, 23, (num_rows, 16), generator=generator)
    is_masked = torch.rand(num_rows, 16, generator=generator) < 0.4
    return torch.where(is_masked, VOCABULARY.mask_token_id, x_0), x_0, is_masked


def _score(network: ReferenceModel, mask_logit: str = "excluded") -> ReferenceScore:
    return ReferenceScore(network=network, excluded_ids=softmax_without(VOCABULARY, mask_logit))


@pytest.mark.parametrize("mask_logit", ["excluded", "included"])
def test_row_sums_are_the_log_probabilities_of_masked_tokens(network: ReferenceModel, mask_logit: str) -> None:
    x_t, x_0, is_masked = _rows(3)
    found = _score(network, mask_logit)(scored_rows(x_t, x_0, is_masked))
    with torch.no_grad():
        logits = network(x_t) @ network.lm_head.weight.T
    if mask_logit == "excluded":
        logits[..., VOCABULARY.mask_token_id] = -torch.inf
    surprise = -torch.log_softmax(logits.double(), dim=-1).gather(2, x_0[..., None])[..., 0]
    assert found.dtype == torch.float64
    assert torch.allclose(found, (surprise * is_masked).sum(dim=1), rtol=1e-5)
    assert float(surprise[is_masked].std()) > 0.1


def test_pieces_of_the_head_change_nothing(network: ReferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = _score(network)
    whole = cost(scored_rows(*_rows(4)))
    monkeypatch.setattr(reference_network, "_LOGIT_ROWS", 3)
    assert torch.allclose(cost(scored_rows(*_rows(4))), whole, rtol=1e-6)


def test_row_without_masks_costs_nothing(network: ReferenceModel) -> None:
    x_t, x_0, is_masked = _rows(3)
    is_masked[1] = False
    sums = _score(network)(scored_rows(x_t, x_0, is_masked))
    assert float(sums[1]) == 0.0 and float(sums[0]) > 0 and float(sums[2]) > 0
