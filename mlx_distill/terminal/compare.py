"""MLX's logits of a model folder beside transformers': the check that needs torch.

In: a folder. Out: how far apart they are on one text, both computed in float32 from the same files.
Decided here: the text (of all kinds of characters, longer than the model's window where that is
short), and what is too far.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_distill.backends.packed import stored_bits
from mlx_distill.errors import DistillError, ModelError
from mlx_distill.files import one_line
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import read_config
from mlx_distill.models.tokenizer import PROBES, load_tokenizer
from mlx_distill.models.weights import read_weights

SHORTEST = 256
LONGEST = 2048  # a window of more tokens is not seen
TOO_FAR = (
    1e-2  # of the logits' standard deviation; rounding gives 1e-5 to 1e-3, a wrong key 0.1 to 10
)


@dataclass(frozen=True)
class Comparison:
    """Differences of logits [T, V]: `largest`, the `spread` (standard deviation) of transformers',
    the share of positions with the same most likely token, KL(transformers‖MLX) in nats a token."""

    tokens: int
    largest: float
    spread: float
    agreement: float
    kl: float

    @property
    def agrees(self) -> bool:
        return self.largest <= TOO_FAR * self.spread  # False where one is not a number

    @classmethod
    def of(cls, found: np.ndarray, wanted: np.ndarray) -> "Comparison":
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        ours, theirs = _log_softmax(found), _log_softmax(wanted)
        divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()
        agreement = (found.argmax(axis=-1) == wanted.argmax(axis=-1)).mean()
        largest = float(np.abs(found - wanted).max())
        return cls(len(wanted), largest, float(wanted.std()), float(agreement), float(divergence))

    def __str__(self) -> str:
        verdict = "ok" if self.agrees else "WRONG"
        return (
            f"over {self.tokens} tokens the largest difference is {self.largest:.1e}, "
            f"{self.largest / self.spread:.1e} of the logits' spread, argmax agreement "
            f"{self.agreement:.2%}, KL {self.kl:.1e} nats a token: {verdict}"
        )


def compare(folder: Path, name: str) -> Comparison:
    """MLX against transformers. Raises `ModelError` for a model that one of them does not load,
    `DistillError` where torch is missing: what is checked without it was found right by then."""
    read_config(folder, name)
    if _quantised(folder, name):
        raise ModelError(
            f"{name}: it is stored quantised, which transformers does not compute as mlx-lm does: "
            "compare the model that it was made from"
        )
    tokens = probe(folder, name)
    found = _mlx_logits(folder, name, tokens)
    if importlib.util.find_spec("torch") is None:
        raise DistillError(
            f"{name}: MLX's rotary embeddings, windows, scales and caps are those of config.json; "
            'comparing logits needs torch, which is not installed: pip install "mlx-distill[torch]"'
        )
    wanted = _transformers_logits(folder, name, tokens)
    rows = min(found.shape[-1], wanted.shape[-1])
    return Comparison.of(found[:, :rows], wanted[:, :rows])


def probe(folder: Path, name: str) -> np.ndarray:
    """Ids [T]: a text of all kinds where there is a tokenizer, and random ones up to the length."""
    meaning = Meaning(folder, name)
    rows = meaning.declared.get("vocab_size") or meaning.stored.get("vocab_size") or 2
    windows = [layer.window for layer in meaning.layers or () if layer.window]
    length = min(LONGEST, max([SHORTEST, *(window + SHORTEST // 2 for window in windows)]))
    try:
        text = load_tokenizer(folder)("\n".join(PROBES), add_special_tokens=False)["input_ids"]
    except ModelError:  # a model without its tokenizer can be compared all the same
        text = []
    random = np.random.default_rng(0).integers(0, rows, length)
    return np.array([*[i for i in text if i < rows], *random])[:length]


def _quantised(folder: Path, name: str) -> bool:
    return bool(stored_bits(Meaning(folder, name).whole))


def _mlx_logits(folder: Path, name: str, tokens: np.ndarray) -> np.ndarray:
    os.environ["MLX_ENABLE_TF32"] = "0"  # GPUs that multiply float32 with 11 bits are told not to
    try:
        import mlx.core as mx

        from mlx_distill.backends.mlx.loading import load_teacher
        from mlx_distill.backends.mlx.weights import cast
    except ImportError as error:
        raise DistillError(f"{name}: MLX cannot be imported ({one_line(error)})") from None
    split = load_teacher(folder, name, 0)
    split.model.update(cast(split.model.parameters(), mx.float32))
    return np.array(split.head(split.hidden(mx.array(tokens[None])))[0].astype(mx.float32))


def _transformers_logits(folder: Path, name: str, tokens: np.ndarray) -> np.ndarray:
    """By eager attention: the plain definition."""
    import torch
    import transformers

    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        with read_weights(folder, name).alone() as alone:
            kind = transformers.AutoModelForCausalLM
            model = kind.from_pretrained(alone, trust_remote_code=False, **options).eval()
        with torch.no_grad():
            return model(torch.from_numpy(tokens[None]), use_cache=False).logits[0].numpy()
    except Exception as error:  # a family's code: any failure says that there is nothing to compare
        raise ModelError(
            f"{name}: transformers cannot compute {folder}: {one_line(error)}"
        ) from None
    finally:
        transformers.utils.logging.set_verbosity(said)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    below = logits - logits.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
