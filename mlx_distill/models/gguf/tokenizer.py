"""`tokenizer.json` and `tokenizer_config.json` of a `.gguf` file.

In: an opened file. Out: a byte-level BPE tokenizer, and the document with its special tokens and
chat template. Decided here: which pre-tokenizers are understood; they are named in a file, not
described, and compared with the families' own tokenizer.json in tests/test_gguf.py.
"""

from typing import TYPE_CHECKING, Any

from mlx_distill.models.gguf.config import special_token_ids
from mlx_distill.models.gguf.file import GGUFFile, short

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of the format
ADDED = (CONTROL, USER_DEFINED)  # found in a text before anything is merged
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLIT += r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT_PATTERNS = {"qwen2": r"\p{N}", "deepseek-r1-qwen": r"\p{N}", "llama-bpe": r"\p{N}{1,3}"}
PRE_TOKENIZERS = ("smollm", "gpt-2", *DIGIT_PATTERNS)


def build_tokenizer(file: GGUFFile) -> "Tokenizer":
    """The byte-level BPE tokenizer of the file: its tokens, merges and special tokens, its family's
    pre-tokenizer.

    Unused ids (the padding of the vocabulary) get no token. Raises `ModelError` for a SentencePiece
    vocabulary and for a pre-tokenizer not in `PRE_TOKENIZERS`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2":
        raise file.refused(
            f"its tokenizer is of the kind {kind!r}, only byte-level BPE (gpt2) is understood"
        )
    if pre not in PRE_TOKENIZERS:
        raise file.refused(f"pre-tokenizer {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    tokens, types = file.listed("tokens", str), file.listed("token_type", int)
    if len(tokens) != len(types):
        raise file.refused(f"{len(tokens)} tokens with {len(types)} types")
    vocabulary = _vocabulary(file, tokens, types)
    added = [token for token, kind in zip(tokens, types, strict=True) if kind in ADDED]
    merges = _merges(file, vocabulary, set(added))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = splitting(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in ADDED
        ]
    )
    if file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        if (bos := file.token_id("bos")) is None:
            raise file.refused(
                "texts begin with a token, but tokenizer.ggml.bos_token_id is missing"
            )
        _put_first(tokenizer, tokens[bos])
    return tokenizer


def tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    """The document that names the special tokens and holds the chat template."""
    tokens = file.listed("tokens", str)
    ids = special_token_ids(file)
    special = {name.removesuffix("_id"): tokens[value] for name, value in ids.items()}
    if (unknown := file.token_id("unknown")) is not None:
        special["unk_token"] = tokens[unknown]
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise file.refused(f"tokenizer.chat_template is {short(template)}, a text was expected")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need("context_length"),
        **special,
        **({"chat_template": template} if template else {}),
    }


def _vocabulary(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, int]:
    used = [i for i, kind in enumerate(types) if kind != UNUSED]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) < len(used):
        raise file.refused("two of its tokens have the same text")
    return vocabulary


def _merges(file: GGUFFile, vocabulary: dict[str, int], added: set[str]) -> list[tuple[str, ...]]:
    """Those that can apply: a vocabulary without merges is written with one that never does."""
    listed = [tuple(merge.split(" ")) for merge in file.listed("merges", str)]
    merges = [merge for merge in listed if not added.issuperset(merge)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise file.refused(
                f"tokenizer.ggml.merges has {' '.join(merge)[:60]!r}, which joins no two of its "
                "tokens to a third"
            )
    return merges


def splitting(pre: str) -> tuple[Any, Any]:
    """The normalizer (or None) and the pre-tokenizer that a GGUF pre-tokenizer name stands for."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return None, plain
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, plain])
    split = pre_tokenizers.Split(Regex(SPLIT.replace("DIGITS", DIGIT_PATTERNS[pre])), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = None if pre == "llama-bpe" else normalizers.NFC()
    return normalizer, pre_tokenizers.Sequence([split, whole])


def _put_first(tokenizer: "Tokenizer", bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
