"""What teacher and student share: hidden states at the loss positions, texts, size.

In: a model that was split at its head. Out: hidden states [N, D], and new token ids as they are
finished, by mlx-lm's batch generator.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_distill.backends.mlx.model import SplitModel
from mlx_distill.backends.mlx.weights import parameter_count
from mlx_distill.backends.protocol import Sampling, check_indices


class MlxModel:
    """What teacher and student share: hidden states, generation, size."""

    def __init__(self, split: SplitModel):
        self.split, self.notes = split, split.notes

    @property
    def parameters(self) -> int:
        return parameter_count(self.split.model)

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
        from mlx_lm.generate import BatchGenerator

        mx.random.seed(sampling.seed)
        generator = BatchGenerator(
            self.split.model,
            max_tokens=sampling.max_new_tokens,
            stop_tokens=[[i] for i in sorted(sampling.stop_ids)],
            sampler=_sampler(sampling.temperature, sampling.top_p),
            completion_batch_size=sampling.batch_size,
            prefill_batch_size=sampling.batch_size,
        )
        try:
            names = generator.insert([list(prompt) for prompt in prompts])
            places = {name: place for place, name in enumerate(names)}
            tokens: dict[int, list[int]] = {name: [] for name in names}
            while responses := generator.next_generated():
                for response in responses:
                    tokens[response.uid].append(response.token)
                    if response.finish_reason is not None:
                        yield places[response.uid], tokens.pop(response.uid)
        finally:
            generator.close()


def _sampler(temperature: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """Log-probabilities → token. The temperature comes before the cut to `top_p`, as in
    transformers (mlx-lm has it after).
    """
    from mlx_lm.sample_utils import make_sampler

    if not temperature:
        return make_sampler(0.0)
    sample = make_sampler(1.0, top_p=top_p if top_p < 1 else 0.0)
    return lambda logprobs: sample((logprobs - logprobs.max(axis=-1, keepdims=True)) / temperature)
