"""LLaDA2.0's network as its publication describes it, in plain torch under the published names: an oracle.

It shares no code with megamask. Attention is full unless a mask is given; experts are merged or separate in the state
dict alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 6e5,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class LLaDA2Reference:
    """The network's state dict, with separate experts, and its logits.

    Args:
        sizes: keys of config.json that differ from SIZES.
    """

    def __init__(self, seed: int = 0, **sizes: Any) -> None:
        self.sizes = SIZES | sizes
        self._generator = torch.Generator().manual_seed(seed)
        s, self.weights = self.sizes, {}
        hidden, heads, keys = s["hidden_size"], s["num_attention_heads"], s["num_key_value_heads"]
        self._add("model.word_embeddings.weight", s["vocab_size"], hidden)
        for layer in range(s["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            self._add(f"{prefix}input_layernorm.weight", hidden)
            self._add(f"{prefix}attention.query_key_value.weight", (heads + 2 * keys) * s["head_dim"], hidden)
            self._add(f"{prefix}attention.query_layernorm.weight", s["head_dim"])
            self._add(f"{prefix}attention.key_layernorm.weight", s["head_dim"])
            self._add(f"{prefix}attention.dense.weight", hidden, heads * s["head_dim"])
            self._add(f"{prefix}post_attention_layernorm.weight", hidden)
            if layer < s["first_k_dense_replace"]:
                self._add_feed_forward(f"{prefix}mlp.", s["intermediate_size"])
                continue
            self._add(f"{prefix}mlp.gate.weight", s["num_experts"], hidden)
            self.weights[f"{prefix}mlp.gate.expert_bias"] = 0.3 * torch.randn(
                s["num_experts"], generator=self._generator
            )
            for expert in range(s["num_experts"]):
                self._add_feed_forward(f"{prefix}mlp.experts.{expert}.", s["moe_intermediate_size"])
            self._add_feed_forward(f"{prefix}mlp.shared_experts.", s["num_shared_experts"] * s["moe_intermediate_size"])
        self._add("model.norm.weight", hidden)
        self._add("lm_head.weight", s["vocab_size"], hidden)

    def _add(self, name: str, *shape: int) -> None:
        value = 0.2 * torch.randn(shape, generator=self._generator)
        self.weights[name] = value + 1.0 if len(shape) == 1 else value

    def _add_feed_forward(self, prefix: str, width: int) -> None:
        hidden = self.sizes["hidden_size"]
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            self._add(f"{prefix}{name}_proj.weight", *shape)

    def merged(self) -> dict[str, Tensor]:
        """The state dict with one tensor a projection for the experts of a layer."""
        found = {name: value for name, value in self.weights.items() if ".experts." not in name}
        s = self.sizes
        for layer in range(s["first_k_dense_replace"], s["num_hidden_layers"]):
            prefix = f"model.layers.{layer}.mlp.experts."
            for name in ("gate_proj", "up_proj", "down_proj"):
                each = [self.weights[f"{prefix}{expert}.{name}.weight"] for expert in range(s["num_experts"])]
                found[prefix + name] = torch.stack(each)
        return found

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[b, s, v] of int64 [b, s]; mask bool [s, s], True where a row of it sees a column."""
        s, w = self.sizes, self.weights
        x = w["model.word_embeddings.weight"][tokens]
        for layer in range(s["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attend(prefix, self._norm(x, f"{prefix}input_layernorm.weight"), mask)
            y = self._norm(x, f"{prefix}post_attention_layernorm.weight")
            is_dense = layer < s["first_k_dense_replace"]
            x = x + (self._swiglu(f"{prefix}mlp.", y) if is_dense else self._mixture(f"{prefix}mlp.", y))
        return self._norm(x, "model.norm.weight") @ w["lm_head.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.sizes["rms_norm_eps"]) * self.weights[name]

    def _swiglu(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _attend(self, prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
        s, w = self.sizes, self.weights
        heads, keys, size = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
        rows, length, _ = x.shape
        mixed = (x @ w[f"{prefix}attention.query_key_value.weight"].T).view(rows, length, heads + 2 * keys, size)
        q, k, v = mixed[:, :, :heads], mixed[:, :, heads : heads + keys], mixed[:, :, heads + keys :]
        q = self._turn(self._norm(q, f"{prefix}attention.query_layernorm.weight"))
        k = self._turn(self._norm(k, f"{prefix}attention.key_layernorm.weight"))
        output = torch.empty(rows, length, heads, size)
        for head in range(heads):
            group = head // (heads // keys)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / size**0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            output[:, :, head] = scores.softmax(-1) @ v[:, :, group]
        return output.flatten(2) @ w[f"{prefix}attention.dense.weight"].T

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary positions on the first channels of each head. Shapes: [b, s, n, c]."""
        half = int(x.size(-1) * self.sizes["partial_rotary_factor"]) // 2
        frequency = self.sizes["rope_theta"] ** -(torch.arange(half) / half)
        angle = torch.arange(x.size(1))[:, None, None] * frequency
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cosine, sine = angle.cos(), angle.sin()
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1)

    def _mixture(self, prefix: str, x: Tensor) -> Tensor:
        s, w = self.sizes, self.weights
        scores = torch.sigmoid(x @ w[f"{prefix}gate.weight"].T)
        choice = scores + w[f"{prefix}gate.expert_bias"]
        output = self._swiglu(f"{prefix}shared_experts.", x)
        for row in range(x.size(0)):
            for place in range(x.size(1)):
                of_group = choice[row, place].view(s["n_group"], -1)
                best = of_group.topk(2, dim=-1).values.sum(-1).topk(s["topk_group"]).indices.tolist()
                size = of_group.size(1)
                allowed = [expert for expert in range(s["num_experts"]) if expert // size in best]
                allowed.sort(key=lambda expert: -float(choice[row, place, expert]))
                chosen = allowed[: s["num_experts_per_tok"]]
                total = sum(float(scores[row, place, expert]) for expert in chosen)
                for expert in chosen:
                    share = float(scores[row, place, expert]) / total * s["routed_scaling_factor"]
                    output[row, place] += share * self._swiglu(f"{prefix}experts.{expert}.", x[row, place])
        return output
