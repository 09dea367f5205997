"""The first steps after an autoregressive start: causal attention that opens, and noise on the mask token's embedding.

Attention (DiffuLLaMA, arXiv:2410.17891, section 3.2): at step s of S each later position becomes visible with
probability s / S, by one draw of L x L cells a step. Noise (LLaDA2.0): the row of the mask
token of an autoregressive checkpoint may have decayed towards zero; independent Gaussian noise on the embeddings of
masked positions keeps the first gradients finite. Both are functions of (run.seed, step, place), so that every layout
and every restart makes the same ones. Evaluation and sampling never see them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamask.models.context import Bidirectional, Context, EmbeddingNoise, Opening
from megamask.objectives.base import Key, Objective, Rows, Samples
from megamask.objectives.shifted import with_shift
from megamask.objectives.wrapped import Wrapped

_RESOLUTION = 1 << 32


@dataclass(frozen=True, kw_only=True)
class WarmStart(Wrapped):
    """A diffusion objective whose first steps are eased.

    Args:
        attention_annealing_steps: S, after which attention is the inner objective's.
        embedding_noise_steps: first steps with noise.
        embedding_noise_std: of the noise.
    """

    attention_annealing_steps: int = 0
    embedding_noise_steps: int = 0
    embedding_noise_std: float = 0.0

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """The inner context, eased."""
        return self._eased(self.inner.context(samples, step, key), samples, step, key)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The inner rows under the eased context."""
        rows = self.inner.rows(samples, step, key)
        return replace(rows, context=self._eased(rows.context, samples, step, key))

    def _eased(self, context: Context, samples: Samples, step: int, key: Key) -> Context:
        if step < self.attention_annealing_steps and isinstance(context.pattern, Bidirectional):
            limit = step * _RESOLUTION // self.attention_annealing_steps
            context = replace(context, pattern=Opening(limit=limit, step=step, key=key))
        if step <= self.embedding_noise_steps:
            num_views = self.shape(samples.tokens.size(1)).num_views
            noise = EmbeddingNoise(
                row_index=samples.sample_index.repeat_interleave(num_views),
                std=self.embedding_noise_std,
                token_id=self.vocabulary.mask_token_id,
                key=key,
            )
            context = replace(context, embedding_noise=noise)
        return context


def eased(
    objective: Objective,
    *,
    shift: bool | int = False,
    attention_annealing_steps: int = 0,
    embedding_noise_steps: int = 0,
    embedding_noise_std: float = 0.0,
) -> Objective:
    """An objective as a run from a source trains it.

    Args:
        shift: as in `with_shift`.
    """
    if attention_annealing_steps or embedding_noise_steps:
        objective = WarmStart(
            inner=objective,
            attention_annealing_steps=attention_annealing_steps,
            embedding_noise_steps=embedding_noise_steps,
            embedding_noise_std=embedding_noise_std,
        )
    return with_shift(objective, shift)
