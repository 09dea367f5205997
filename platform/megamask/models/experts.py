"""The mixture of experts of a network in numbers: a router sends each token to some of many feed-forward parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megamask.config.rules.experts import expert_problems
from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """Experts and router of the layers that have them.

    Args:
        num_experts: of each such layer.
        topk: experts of a token; with `choice` "experts", of a token on average.
        ffn_hidden_size: width of an expert.
        num_shared: experts that every token visits, beside the chosen ones; one matrix of num_shared widths.
        num_dense_layers: first layers of the network, which have a dense feed-forward part instead.
        score: "softmax" over the experts, or a "sigmoid" of each.
        normalizes: whether the weights of a token's experts sum to `scale`.
        scale: factor on the weights.
        num_groups, topk_groups: experts lie in groups, and a token chooses among the experts of its best groups only.
        choice: "tokens" choose experts, or "experts" choose tokens of each row.
        has_bias: whether a bias, moved after each step towards experts with few tokens, is added to the scores for the
            choice alone (arXiv:2408.15664).
        bias_rate: how far the bias moves at a step.
        balance_weight: of the loss of each row that spreads its tokens over the experts (DeepSeek-V3, equations 17-20,
            arXiv:2412.19437).

    Raises:
        UsageError: when the numbers do not fit together; names the keys to change.
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    num_shared: int = 0
    num_dense_layers: int = 0
    score: str = "softmax"
    normalizes: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    choice: str = "tokens"
    has_bias: bool = False
    bias_rate: float = 0.0
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        for problem in expert_problems(
            num_experts=self.num_experts,
            topk=self.topk,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            choice=self.choice,
            has_bias=self.has_bias,
            balance_weight=self.balance_weight,
        ):
            raise UsageError(
                f"{problem.description(getattr(self, _FIELDS[problem.key]))}. Nothing was built.",
                hint="change the model section of the config",
            )

    @property
    def shared_hidden_size(self) -> int:
        """Width of the part that every token visits; 0 for none."""
        return self.num_shared * self.ffn_hidden_size

    def capacity(self, num_positions: int) -> int:
        """Tokens of a row that each expert takes where experts choose."""
        return min(-(-num_positions * self.topk // self.num_experts), num_positions)

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)

    def to_section(self) -> dict[str, Any]:
        """The keys of the config's section `model` that decide how these weights compute.

        Those of training alone, `router_bias_rate` and `router_balance_weight`, are left out.
        """
        return {name: getattr(self, field) for name, field in _OF_SECTION.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertSpec:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: when a field is missing, unknown or of another type.
            UsageError: when the numbers do not fit together.
        """
        kinds = {"int": (int,), "bool": (bool,), "float": (int, float), "str": (str,)}
        expected = {field.name: str(field.type) for field in fields(cls)}
        if set(value) != set(expected):
            raise ValueError(f"expert fields differ: {', '.join(sorted(set(value) ^ set(expected)))}")
        for name, kind in expected.items():
            if type(value[name]) not in kinds[kind]:
                raise ValueError(f"expert field {name} is {value[name]!r}; allowed: {kind}")
        return cls(**value)


_OF_SECTION = {
    "num_experts": "num_experts",
    "router_topk": "topk",
    "expert_ffn_hidden_size": "ffn_hidden_size",
    "num_shared_experts": "num_shared",
    "num_dense_layers": "num_dense_layers",
    "router_score": "score",
    "router_choice": "choice",
    "router_normalize": "normalizes",
    "router_scale": "scale",
    "router_groups": "num_groups",
    "router_topk_groups": "topk_groups",
    "router_expert_bias": "has_bias",
}
_FIELDS = {f"model.{name}": field for name, field in _OF_SECTION.items()} | {
    "model.router_balance_weight": "balance_weight"
}
