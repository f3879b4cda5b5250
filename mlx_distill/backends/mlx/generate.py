"""What teacher and student share: hidden states at the loss positions, texts, size.

In: a model that was split at its head. Out: hidden states [N, D], and new token ids as they are
finished, by mlx-lm's batch generator.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_distill.backends.activations import Activations
from mlx_distill.backends.draws import draws_of
from mlx_distill.backends.failures import OF_TEXTS, OF_TEXTS_READ, explained
from mlx_distill.backends.mlx.activations import activations
from mlx_distill.backends.mlx.model import SplitModel
from mlx_distill.backends.mlx.weights import parameter_count
from mlx_distill.backends.protocol import Sampling, check_indices

Sampler = Callable[[mx.array], mx.array]


class MlxModel:
    """What teacher and student share: hidden states, generation, size."""

    def __init__(self, split: SplitModel):
        self.split, self.notes = split, split.notes

    @property
    def parameters(self) -> int:
        return parameter_count(self.split.model)

    def activations(self, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
        """How much each part does, over the tokens of `texts`."""
        with explained("reading texts", OF_TEXTS_READ):
            return activations(self.split, texts, head_dim)

    @property
    def vocabulary_rows(self) -> int:
        return self.split.head_rows()

    def gather(self, tokens: np.ndarray, positions: np.ndarray) -> mx.array:
        """The hidden states [N, D] at flat `positions` [N] of `tokens` [B, T]; all indices are
        checked, MLX does not.
        """
        check_indices("tokens", tokens, self.vocabulary_rows)
        check_indices("loss positions", positions, tokens.size)
        hidden = self.split.hidden(mx.array(tokens))
        return hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids) as they finish, the stop id included where one came."""
        tokens: dict[int, list[int]] = {place: [] for place in range(len(prompts))}
        for place, token, ends in self._tokens(prompts, sampling):
            tokens[place].append(token)
            if ends:
                yield place, tokens.pop(place)

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The new ids of one text, each as it is made."""
        for _, token, _ in self._tokens([prompt], sampling):
            yield token

    def _tokens(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, int, bool]]:
        """(which prompt, a new id, whether it is the text's last) by mlx-lm's batch generator."""
        from mlx_lm.generate import BatchGenerator

        samplers = _samplers(sampling, prompts)
        generator = BatchGenerator(
            self.split.model,
            max_tokens=sampling.max_new_tokens,
            stop_tokens=[[i] for i in sorted(sampling.stop_ids)],
            completion_batch_size=sampling.batch_size,
            prefill_batch_size=sampling.batch_size,
        )
        try:
            names = generator.insert([list(prompt) for prompt in prompts], samplers=samplers)
            places = {name: place for place, name in enumerate(names)}
            while responses := _next(generator):
                for response in responses:
                    ends = response.finish_reason is not None
                    yield places[response.uid], response.token, ends
        finally:
            generator.close()


def _next(generator: Any) -> list[Any]:
    """What mlx-lm's generator makes next: a token of each text under way."""
    with explained("generating", OF_TEXTS):
        return generator.next_generated()


def _samplers(sampling: Sampling, prompts: Sequence[Sequence[int]]) -> list[Sampler] | None:
    """For each prompt: log-probabilities [1, V] → token [1]; None is the generator's own, greedy."""
    if not sampling.temperature:
        return None
    return [
        partial(_drawn, sampling=sampling, numbers=numbers)
        for numbers in draws_of(sampling, prompts)
    ]


def _drawn(log_probs: mx.array, sampling: Sampling, numbers: Iterator[float]) -> mx.array:
    """The token at which the cumulated probability first exceeds the position's number.

    The temperature comes before the cut to `top_p`, as in transformers (mlx-lm has it after).
    """
    probs = mx.softmax(log_probs.astype(mx.float32) / sampling.temperature, axis=-1)
    if sampling.top_p < 1:
        order = mx.argsort(-probs, axis=-1)
        ranked = mx.take_along_axis(probs, order, axis=-1)
        before = mx.cumsum(ranked, axis=-1) - ranked
        kept = mx.where(before < sampling.top_p, ranked, 0.0)
        probs = mx.put_along_axis(mx.zeros_like(probs), order, kept, axis=-1)
    cumulated = mx.cumsum(probs, axis=-1)
    return mx.argmax(cumulated > next(numbers) * cumulated[:, -1:], axis=-1)
