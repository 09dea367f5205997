"""A network in numbers: the config's model section, completed and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megamask.config.rules.model import effective_head_dim, effective_query_groups, model_problems, padded_vocab_size
from megamask.config.schema.model import ModelConfig
from megamask.errors import UsageError
from megamask.models.experts import ExpertSpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A bidirectional transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention; no dropout.

    The fields are those of config/schema/model.py with every default resolved, and three sizes that come from the
    corpus and the training section.

    Args:
        vocab_size: entries of the tokenizer; canonical tensors have exactly these rows.
        padded_vocab_size: vocab_size rounded up; the extra rows are zero and never enter a loss.
        max_sequence_length: `training.sequence_length`.
        experts: of the layers that have them; None for a dense network.

    Raises:
        UsageError: when the numbers do not fit together; names the keys to change.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    qk_norm: bool
    qkv_bias: bool
    tie_embeddings: bool
    rope_theta: float
    norm_eps: float
    init_std: float
    vocab_size: int
    padded_vocab_size: int
    max_sequence_length: int
    rotary_fraction: float = 1.0
    experts: ExpertSpec | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise _refusal(f"model.{name} is {getattr(self, name)}; allowed: >= 1")
        for name in _REALS:
            if not 0 < getattr(self, name) < float("inf"):
                raise _refusal(f"model.{name} is {getattr(self, name)}; allowed: a number > 0")
        _refuse_first(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
            rotary_fraction=self.rotary_fraction,
        )
        if self.padded_vocab_size < self.vocab_size:
            raise _refusal(
                f"the vocabulary has {self.vocab_size} entries but is padded to {self.padded_vocab_size}; allowed: no "
                "less than the entries"
            )

    @classmethod
    def from_config(cls, model: ModelConfig, vocab_size: int, sequence_length: int) -> ModelSpec:
        """Complete a model section.

        Args:
            model: the section as configured; its own ranges hold already.
            vocab_size: entries of the corpus' tokenizer.
            sequence_length: tokens of a row.

        Raises:
            UsageError: when the numbers do not fit together; names the keys to change.
        """
        heads = model.num_attention_heads
        _refuse_first(
            hidden_size=model.hidden_size,
            num_attention_heads=heads,
            num_query_groups=model.num_query_groups,
            head_dim=model.head_dim,
            rotary_fraction=model.rotary_fraction,
        )
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=effective_query_groups(heads, model.num_query_groups),
            head_dim=effective_head_dim(model.hidden_size, heads, model.head_dim),
            qk_norm=model.qk_norm,
            qkv_bias=model.qkv_bias,
            tie_embeddings=model.tie_embeddings,
            rope_theta=float(model.rope_theta),
            norm_eps=float(model.norm_eps),
            init_std=float(model.init_std),
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size(vocab_size, model.vocab_padding_multiple),
            max_sequence_length=sequence_length,
            rotary_fraction=float(model.rotary_fraction),
            experts=None if model.experts is None else ExpertSpec(**model.experts),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object of integers, booleans and real numbers.

        What a dense network with full rotary positions does not have is left out: records from before these options
        have no such fields.
        """
        found = {name: value for name, value in asdict(self).items() if name not in _OPTIONAL}
        if self.rotary_fraction != 1.0:
            found["rotary_fraction"] = self.rotary_fraction
        if self.experts is not None:
            found["experts"] = self.experts.to_json()
        return found

    def has_experts(self, layer: int) -> bool:
        """True if a layer, by its global number, has experts instead of a dense feed-forward part."""
        return self.experts is not None and layer >= self.experts.num_dense_layers

    @property
    def rotary_channels(self) -> int:
        """The first channels of a head, which rotary positions turn."""
        return round(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError: when a field is missing, unknown or of another type.
            UsageError: when the numbers do not fit together.
        """
        optional: dict[str, Any] = {}
        if "experts" in value:
            if not isinstance(value["experts"], dict):
                raise ValueError(f"model field experts is {value['experts']!r}; allowed: an object")
            optional["experts"] = ExpertSpec.from_json(value["experts"])
        expected = {field.name: str(field.type) for field in fields(cls) if field.name not in _OPTIONAL}
        if "rotary_fraction" in value:
            expected["rotary_fraction"] = "float"
        value = {name: given for name, given in value.items() if name != "experts"}
        if set(value) != set(expected):
            raise ValueError(f"model fields differ: {', '.join(sorted(set(value) ^ set(expected)))}")
        for name, kind in expected.items():
            is_right = {
                "int": type(value[name]) is int,
                "bool": type(value[name]) is bool,
                "float": type(value[name]) in (int, float),
            }[kind]
            if not is_right:
                raise ValueError(f"model field {name} is {value[name]!r}; allowed: {kind}")
        reals: dict[str, Any] = {name: float(value[name]) for name, kind in expected.items() if kind == "float"}
        return cls(**(value | reals | optional))


_COUNTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "max_sequence_length",
)
_REALS = ("rope_theta", "norm_eps", "init_std", "rotary_fraction")
_OPTIONAL = ("rotary_fraction", "experts")


def _refuse_first(
    *,
    hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int | None,
    head_dim: int | None,
    rotary_fraction: float,
) -> None:
    """Refuse sizes that contradict one another.

    Raises:
        UsageError: the first problem of `model_problems`.
    """
    values = {
        "model.hidden_size": hidden_size,
        "model.num_attention_heads": num_attention_heads,
        "model.num_query_groups": num_query_groups,
        "model.head_dim": head_dim,
        "model.rotary_fraction": rotary_fraction,
    }
    for problem in model_problems(
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_query_groups,
        head_dim=head_dim,
        rotary_fraction=rotary_fraction,
    ):
        raise _refusal(problem.description(values[problem.key]))


def _refusal(message: str) -> UsageError:
    return UsageError(f"{message}. Nothing was built.", hint="change the model section of the config")
