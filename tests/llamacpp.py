"""llama.cpp in a test, through `xllamacpp`: it opens a `.gguf` file and is asked on loopback."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """A model that llama.cpp has open; keys and values are kept in float32, so that what differs is
    the file.
    """

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="pip install 'mlx-distill[llamacpp]'")
        asked = xllamacpp.CommonParams()
        asked.model.path = str(path)
        asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 512, 1, 0
        asked.cpuparams.n_threads, asked.warmup, asked.verbosity = 1, False, -1
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(asked)

    def ask(self, path: str, **body: Any) -> dict:
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def ids(self, text: str) -> list[int]:
        """Those of a text without what a tokenizer puts around it."""
        asked = {"content": text, "add_special": False, "parse_special": True}
        return self.ask("/tokenize", **asked)["tokens"]

    def prompt(self, *turns: tuple[str, str]) -> str:
        """The turns by the file's own chat template, ready to be answered."""
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.ask("/apply-template", messages=messages)["prompt"]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What it writes, without the id that ends it."""
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
        return self.ask("/completion", **asked)["tokens"]

    def log_probs(self, prompt: list[int], vocabulary: int) -> np.ndarray:
        """Of what may follow the prompt, float64 [V]."""
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0}
        answer = self.ask("/completion", **asked, ignore_eos=False)
        found = np.full(vocabulary, -np.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found
