"""A tokenizer as fields of a `.gguf` file: the inverse of `tokenizer.py`.

In: a byte-level BPE tokenizer, with its special tokens and chat template. Out: those fields, and
what llama.cpp will tokenise otherwise, as sentences. Decided here: by which name llama.cpp knows a
pre-tokenizer. A vocabulary without merges, one token a byte, needs none; llama.cpp asks for a list
of merges that is not empty, so it gets one that can never apply.
"""

import json
from typing import TYPE_CHECKING, Any

from mlx_distill.models.gguf.fields import refused
from mlx_distill.models.gguf.tokenizer import (
    CONTROL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    splitting,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerFast

NORMAL = 1
WITHOUT_MERGES = "gpt-2"  # any name would do: there is nothing to merge within a piece
ENDS = ("eos", "eot", "eom")  # as many ids as a file can name that end a text
SAMPLE = "a"  # a text to which a tokenizer may add tokens of its own


class Vocabulary:
    """A tokenizer to be written. `name` is how a message begins, `rows` those of the embedding,
    `ends` the ids that end a text. Raises `ModelError` for a kind that llama.cpp's byte-level BPE
    does not compute.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", name: str, rows: int, ends: list[int]):
        self.tokenizer, self.name, self.rows = tokenizer, name, rows
        self.document = json.loads(tokenizer.backend_tokenizer.to_str())
        self.added = {token["id"]: token for token in self.document["added_tokens"]}
        self._refuse_other_kinds()
        self.merges = [_as_text(merge) for merge in self.document["model"]["merges"]]
        self.pre = self._pre_tokenizer()
        self.tokens = self._tokens()
        own = tokenizer.eos_token_id
        self.ends = sorted(ends, key=lambda token: token != own)

    def add_to(self, writer: "GGUFWriter") -> None:
        """All fields of the tokenizer."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([self._type(token) for token in range(self.rows)])
        writer.add_token_merges(self.merges or [self._merge_that_never_applies()])
        self._add_special(writer)
        if template := self.tokenizer.chat_template:
            named = template if isinstance(template, dict) else {"default": template}
            writer.add_chat_template(
                [{"name": name, "template": text} for name, text in sorted(named.items())]
            )

    def notes(self) -> list[str]:
        """What llama.cpp will do otherwise than tokenizer.json says."""
        said = []
        words = [token["content"] for token in self.added.values() if token["single_word"]]
        if words:
            said.append(
                f"llama.cpp finds {_listed(words)} inside of words, too; tokenizer.json only where "
                "they stand alone"
            )
        if self.document["normalizer"]:
            kind = self.document["normalizer"]["type"]
            said.append(f"llama.cpp does not normalise texts; tokenizer.json does ({kind})")
        if left_out := self.ends[len(ENDS) :]:
            texts = [self.tokens[token] for token in left_out]
            said.append(f"a .gguf file names {len(ENDS)} ids that end a text; without {texts}")
        return said

    def _refuse_other_kinds(self) -> None:
        model, decoder = self.document["model"], self.document["decoder"]
        kind = model["type"]
        byte_level = "ByteLevel" in json.dumps([decoder, self.document["pre_tokenizer"]])
        if kind != "BPE" or model.get("byte_fallback") or not byte_level:
            what = f"{kind} with byte fallback" if model.get("byte_fallback") else kind
            raise refused(
                self.name, f"its tokenizer is {what}, only byte-level BPE can be written as GGUF"
            )
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise refused(self.name, f"its tokenizer has {key}, which llama.cpp lacks")
        normalizer = self.document["normalizer"]
        if normalizer and normalizer["type"] != "NFC":
            raise refused(self.name, f"its tokenizer normalises ({normalizer['type']})")

    def _pre_tokenizer(self) -> str:
        if not self.merges:
            return WITHOUT_MERGES
        found = _plain(self.document["pre_tokenizer"])
        ignores = bool(self.document["model"].get("ignore_merges"))
        for name in PRE_TOKENIZERS:
            known = _plain(json.loads(splitting(name)[1].__getstate__()))
            if found == known and ignores == (name == "llama-bpe"):
                return name
        raise refused(
            self.name,
            f"its pre-tokenizer is none that llama.cpp has by a name known here "
            f"({', '.join(PRE_TOKENIZERS)})",
        )

    def _tokens(self) -> list[str]:
        """Token of each row of the embedding; rows without one are called after their number."""
        by_id = {token: text for text, token in self.tokenizer.get_vocab().items()}
        if (highest := max(by_id)) >= self.rows:
            raise refused(
                self.name, f"its tokenizer has the id {highest} for {self.rows} embedding rows"
            )
        return [by_id.get(row, f"[PAD{row}]") for row in range(self.rows)]

    def _type(self, token: int) -> int:
        if entry := self.added.get(token):
            return CONTROL if entry["special"] else USER_DEFINED
        return UNUSED if self.tokens[token] == f"[PAD{token}]" else NORMAL

    def _merge_that_never_applies(self) -> str:
        """Of two added tokens, which are found in a text before anything is merged."""
        if not self.added:
            raise refused(self.name, "its tokenizer has neither merges nor added tokens")
        first = self.added[min(self.added)]["content"]
        return f"{first} {first}"

    def _add_special(self, writer: "GGUFWriter") -> None:
        for kind, token in zip(ENDS, self.ends, strict=False):
            getattr(writer, f"add_{kind}_token_id")(token)
        for kind in ("bos", "pad", "unk"):
            token = getattr(self.tokenizer, f"{kind}_token_id")
            if token is not None:
                getattr(writer, f"add_{kind}_token_id")(token)
        first, last = self._around_a_text()
        writer.add_add_bos_token(bool(first))
        writer.add_add_eos_token(bool(last))

    def _around_a_text(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        plain = self.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(SAMPLE)["input_ids"]
        place = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        first, last = whole[:place], whole[place + len(plain) :]
        bos, eos = self.tokenizer.bos_token_id, self.ends[0] if self.ends else None
        if first not in ([], [bos]) or last not in ([], [eos]):
            raise refused(self.name, f"its tokenizer puts the ids {first} and {last} around a text")
        return first, last


def _plain(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer's parts without what changes no id."""
    if splitter is None:
        return []
    if splitter["type"] == "Sequence":
        return [part for each in splitter["pretokenizers"] for part in _plain(each)]
    return [{key: value for key, value in splitter.items() if key != "trim_offsets"}]


def _as_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _listed(words: list[str]) -> str:
    return ", ".join(map(repr, words))
