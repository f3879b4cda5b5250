"""Tiny random models of many families, saved by today's transformers, with the logits that
transformers gives them.

The weights are large and the texts longer than the windows, so that a wrong rotary base, window,
cap or scale shows: such a model's logits are off by a large part of their spread.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TOKENS = np.random.default_rng(5).integers(3, 96, size=(2, 56))
THETA = 500_000.0
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10_000.0,
    "beta_fast": 4.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": THETA,
}


def longrope(original: int, pairs: int = 8) -> dict[str, Any]:
    """Factors that differ for short and long texts."""
    short, long = ([round(1 + step * pair, 3) for pair in range(pairs)] for step in (0.15, 0.9))
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "rope_theta": THETA,
    }


@dataclass(frozen=True)
class Family:
    """`type` is transformers' model type; `options` are what its config is made of beside
    `SMALL`."""

    type: str
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """A folder as today's transformers writes it."""
        config = transformers.AutoConfig.for_model(self.type, **(SMALL | self.options))
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        ).float()
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=random)
                weight.copy_(
                    noise * 0.25
                    if weight.ndim > 1 or name.endswith("bias")
                    else weight + 0.2 * noise
                )
        model.eval().save_pretrained(folder)
        return folder


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": THETA} | parameters}


FAMILIES = {
    "llama": Family("llama", rope()),
    "llama-linear": Family("llama", rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": Family(
        "llama", rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 32}
    ),
    "llama-llama3": Family("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": Family("llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": Family(
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.7, "beta_fast": 8, "beta_slow": 0.5}},
    ),
    "llama-yarn-mscale": Family(
        "llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}
    ),
    "llama-yarn-mscale-alone": Family("llama", {"rope_parameters": YARN | {"mscale": 0.7}}),
    "llama-yarn-not-truncated": Family("llama", {"rope_parameters": YARN | {"truncate": False}}),
    "llama-longrope": Family("llama", {"rope_parameters": longrope(64)}),
    "llama-tied": Family("llama", rope() | {"tie_word_embeddings": True}),
    "llama-biases": Family(
        "llama", rope() | {"attention_bias": True, "mlp_bias": True, "head_dim": 24}
    ),
    "mistral": Family("mistral", rope() | {"sliding_window": None}),
    "mistral-window": Family("mistral", rope() | {"sliding_window": 12}),
    "qwen2": Family("qwen2", rope()),
    "qwen2-window": Family(
        "qwen2", rope() | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}
    ),
    "qwen2-yarn": Family("qwen2", {"rope_parameters": YARN}),
    "qwen3": Family("qwen3", rope() | {"head_dim": 16}),
    "qwen3-window": Family(
        "qwen3",
        rope()
        | {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    "smollm3": Family("smollm3", rope()),
    "smollm3-every-second": Family("smollm3", rope() | {"no_rope_layers": [0, 1, 0, 1]}),
    "smollm3-window": Family(
        "smollm3", rope() | {"use_sliding_window": True, "sliding_window": 12}
    ),
    "phi": Family("phi", rope(partial_rotary_factor=0.5)),
    "phi3": Family("phi3", rope()),
    "phi3-partial": Family("phi3", rope(partial_rotary_factor=0.5)),
    "phi3-window": Family("phi3", rope() | {"sliding_window": 12}),
    "phi3-longrope": Family(
        "phi3", {"rope_parameters": longrope(64), "original_max_position_embeddings": 64}
    ),
    "phi3-longrope-long": Family(
        "phi3", {"rope_parameters": longrope(32), "original_max_position_embeddings": 32}
    ),
    "phi3-longrope-partial": Family(
        "phi3",
        {
            "rope_parameters": longrope(64, 6) | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 64,
        },
    ),
    "olmo2": Family("olmo2", rope()),
    "olmo3": Family("olmo3", rope() | {"rope_parameters": None, "sliding_window": 12}),
    "olmo3-yarn": Family(
        "olmo3",
        {
            "sliding_window": 12,
            "rope_parameters": {
                "sliding_attention": rope()["rope_parameters"],
                "full_attention": YARN,
            },
        },
    ),
    "gemma": Family("gemma", rope() | {"head_dim": 16}),
    "gemma2": Family(
        "gemma2", rope() | {"head_dim": 16, "sliding_window": 128, "query_pre_attn_scalar": 24}
    ),
    "gemma2-window": Family(
        "gemma2", rope() | {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24}
    ),
    "gemma3_text": Family(
        "gemma3_text",
        {
            "hidden_size": 80,  # whose root bfloat16 does not hold
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            },
        },
    ),
    "cohere": Family("cohere", rope() | {"logit_scale": 0.5}),
    "cohere-qk-norm": Family("cohere", rope() | {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": Family("cohere2", rope() | {"logit_scale": 0.5, "sliding_window": 12}),
    "granite": Family(
        "granite",
        rope()
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "glm4": Family(
        "glm4", rope(partial_rotary_factor=0.5) | {"head_dim": 16, "attention_bias": True}
    ),
    "stablelm": Family("stablelm", rope(partial_rotary_factor=0.25) | {"use_qkv_bias": True}),
    "starcoder2": Family("starcoder2", rope() | {"sliding_window": None}),
    "starcoder2-window": Family("starcoder2", rope() | {"sliding_window": 12}),
    "hunyuan": Family("hunyuan_v1_dense", rope() | {"head_dim": 16}),
    "hunyuan-alpha": Family(
        "hunyuan_v1_dense", rope(rope_type="dynamic", alpha=1000.0, factor=1.0) | {"head_dim": 16}
    ),
}


@torch.no_grad()
def transformers_logits(folder: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """float32 [B, T, V], by eager attention: the plain definition."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
