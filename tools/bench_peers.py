#!/usr/bin/env python3
"""Training's speed beside the loop that one would otherwise write: Hugging Face's Llama, full logits, torch's AdamW.

The loop trains masked diffusion as published code does: one view of each sample, t uniform, logits of every position,
cross entropy of the masked ones weighted by 1/p and divided by all tokens. The engine does the same work (one view),
and its own default (the complementary pair). One process, float32, the same shape of network, the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from bench_objectives import CASES, SHAPES, SINGLE, Case
from bench_support import Report, alternate, one_process, ratio, spread, step_arguments, timed
from bench_train import OPTIMIZER, Shape
from torch.nn import functional

PAIR = "masked, complementary pair"
PEER = "Hugging Face loop"


class HuggingFaceLoop:
    """Takes a step each time it is called."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        spec = shape.spec()
        self._shape, self._step = shape, 0
        config = LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.ffn_hidden_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_attention_heads,
            num_key_value_heads=spec.num_query_groups,
            max_position_embeddings=spec.max_sequence_length,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
        torch.manual_seed(1)
        self._model = LlamaForCausalLM(config).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=1e-3, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps
        )
        self._generator = torch.Generator().manual_seed(2)
        size, length = shape.batch_size, shape.sequence_length
        self._mask = torch.zeros(size, 1, length, length)  # additive: every position sees every position

    def __call__(self) -> None:
        """One step."""
        self._step += 1
        shape = self._shape
        tokens = shape.batch(self._step * shape.batch_size, shape.batch_size).tokens
        p = 1e-3 + (1 - 1e-3) * torch.rand(len(tokens), 1, generator=self._generator)
        is_masked = torch.rand(tokens.shape, generator=self._generator) < p
        x_t = tokens.masked_fill(is_masked, shape.vocabulary().mask_token_id)
        self._optimizer.zero_grad()
        logits = self._model(input_ids=x_t, attention_mask=self._mask).logits
        entropy = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        loss = (entropy * is_masked / p).sum() / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_grad_norm)
        self._optimizer.step()


def measure(report: Report, shape: Shape, arguments: argparse.Namespace) -> None:
    """The loop and the engine in turns."""
    engines = {name: Case(shape, CASES[name]) for name in (SINGLE, PAIR)}
    cases = {PEER: HuggingFaceLoop(shape), **engines}
    seconds = alternate({name: timed(case, arguments.clock) for name, case in cases.items()}, blocks=arguments.blocks)
    tokens = shape.batch_size * shape.sequence_length
    # expectations: a single view scores half of its tokens, which is what many steps give
    scored = {PEER: tokens / 2, SINGLE: tokens / 2, PAIR: tokens}
    table = report.table(
        "A step, and a scored token",
        ["case", "step, s", "speed to the loop", "us a scored token", "speed by scored token"],
        "Speeds: the loop's time over the case's; above 1 the case is faster. A pair scores every token of a row, a "
        "single view half of them on average.",
    )
    of_peer = [value / scored[PEER] for value in seconds[PEER]]
    for name in cases:
        each = [value / scored[name] for value in seconds[name]]
        table.add(
            name,
            spread(seconds[name]),
            ratio(seconds[PEER], seconds[name]),
            spread(each, scale=1e6),
            ratio(of_peer, each),
        )
    report.keep("seconds", seconds)
    for case in engines.values():
        case.engine.close()


def main() -> int:
    """Measure the loop and the engine."""
    _, parse = step_arguments(__doc__, SHAPES, blocks=7, shape="language")
    arguments = parse()
    shape, report = SHAPES[arguments.shape], Report("bench_peers", "Training beside a Hugging Face loop", arguments)
    report.keep("shape", dataclasses.asdict(shape))
    with one_process():
        measure(report, shape, arguments)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
