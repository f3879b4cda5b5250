"""What teacher and student share: hidden states at the loss positions, texts, size.

In: a model that was split at its head. Out: hidden states [N, D], and new token ids as they are
finished, by transformers' `generate`, a batch at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mlx_distill.backends.activations import Activations
from mlx_distill.backends.draws import draws_of
from mlx_distill.backends.protocol import Sampling, check_indices
from mlx_distill.backends.torch.activations import activations
from mlx_distill.backends.torch.adapters import parameter_count
from mlx_distill.backends.torch.failures import explained
from mlx_distill.backends.torch.model import SplitModel


class TorchModel:
    """What teacher and student share: hidden states, generation, size."""

    def __init__(self, split: SplitModel):
        self.split, self.notes = (
            split,
            (),
        )  # transformers' own reading of the folder is the right one
        self.device = split.device
        self.parameters = parameter_count(split.model)
        self.vocabulary_rows = split.head_rows()

    def activations(self, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
        """How much each part does, over the tokens of `texts`."""
        with explained("reading texts"):
            return activations(self.split, texts, head_dim)

    def gather(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """The hidden states [N, D] at flat `positions` [N] of `tokens` [B, T]; all indices are
        checked, CUDA's checks kill the process.
        """
        check_indices("tokens", tokens, self.vocabulary_rows)
        check_indices("loss positions", positions, tokens.size)
        hidden = self.split.hidden(self.tensor(tokens).long())
        return hidden.reshape(-1, hidden.shape[-1])[self.tensor(positions).long()]

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def precision(self) -> AbstractContextManager:
        """What a forward pass is computed in."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids), a batch at a time, the stop id included where one came."""
        numbers = draws_of(sampling, prompts)
        self.split.model.generation_config = _generation(sampling)
        # the longest first: they need the most memory
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), sampling.batch_size):
            group = order[start : start + sampling.batch_size]
            with self.precision(), explained("generating"):
                drawn = _Drawn(sampling, [numbers[i] for i in group])
                texts = self._generate([prompts[i] for i in group], sampling.stop_ids, drawn)
            yield from zip(group, texts, strict=True)

    def _generate(
        self,
        prompts: list[Sequence[int]],
        stop_ids: frozenset[int],
        drawn: "_Drawn",
        streamer: "_Streamer | None" = None,
    ) -> list[list[int]]:
        """One batch, padded at the left; of a single prompt a `streamer` may follow the ids."""
        width = max(map(len, prompts))
        tokens = self.tensor(
            np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        )
        mask = self.tensor(
            np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        )
        processors = transformers.LogitsProcessorList([drawn] if drawn.sampling.temperature else [])
        texts = self.split.model.generate(
            tokens,
            attention_mask=mask,
            logits_processor=processors,
            stopping_criteria=[streamer.is_left] if streamer else None,
            streamer=streamer,
        )[:, width:].tolist()
        return [
            text[: next((i + 1 for i, token in enumerate(text) if token in stop_ids), None)]
            for text in texts
        ]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The new ids of one text, each as it is made, by transformers in a thread of its own."""
        self.split.model.generation_config = _generation(sampling)
        drawn, streamer = _Drawn(sampling, draws_of(sampling, [prompt])), _Streamer()

        def write() -> None:
            try:
                with torch.no_grad(), self.precision(), explained("generating"):
                    self._generate([prompt], sampling.stop_ids, drawn, streamer)
            except Exception as error:  # raised again where it is waited for
                streamer.said.put(error)

        thread = Thread(target=write, daemon=True)
        thread.start()
        try:
            while (said := streamer.said.get()) is not None:
                if isinstance(said, Exception):
                    raise said
                yield said
        finally:
            streamer.left.set()
            thread.join()


class _Streamer(BaseStreamer):
    """Hands on what `generate` puts: the prompt, which is left out, then ids, then the end."""

    def __init__(self) -> None:
        self.said: SimpleQueue[int | Exception | None] = SimpleQueue()
        self.left = Event()
        self._prompt = True

    def is_left(self, ids: Tensor, scores: Tensor) -> bool:
        """Whether nobody listens any more, as a stopping criterion."""
        return self.left.is_set()

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            for token in value.reshape(-1).tolist():
                self.said.put(token)
        self._prompt = False

    def end(self) -> None:
        self.said.put(None)


class _Drawn(transformers.LogitsProcessor):
    """Leaves one token of each row's logits [B, V]: the one at which the cumulated probability first
    exceeds the row's number for this position.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[Iterator[float]]):
        self.sampling, self._numbers = sampling, numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = torch.softmax(scores.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
            before = ranked.cumsum(dim=-1) - ranked
            kept = ranked.where(before < self.sampling.top_p, 0.0)
            probs = torch.zeros_like(probs).scatter(-1, order, kept)
        cumulated = probs.cumsum(dim=-1)
        numbers = cumulated.new_tensor([[next(row)] for row in self._numbers])
        token = (cumulated > numbers * cumulated[:, -1:]).int().argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def _generation(sampling: Sampling) -> transformers.GenerationConfig:
    """The likeliest token, which is the drawn one where texts are drawn, and nothing of what the
    model's own `generation_config.json` asks for.
    """
    return transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(sampling.stop_ids) or None,
        pad_token_id=0,
        use_cache=True,
        do_sample=False,
    )
