"""The keys of a config.json that change what a model computes.

In: a config class of transformers. Out: the names of its keys. Decided here: which keys change no
arithmetic of a text without dropout, and that a key counts where the family's code names it.
"""

import inspect
import re
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

QUANTISATION = ("quantization", "quantization_config")  # mlx-lm writes both

HARMLESS = {  # keys that change no arithmetic of a text without dropout
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "eod_token_id",
    "pretraining_tp",
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "embedding_dropout",
    "classifier_dropout",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "max_position_embeddings",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "is_decoder",
    "sep_token_id",
    "decoder_start_token_id",
}
INITIAL_OR_KERNEL = {  # what random weights are made by, how long texts may be, which kernel runs
    "emb_pdrop",
    "max_seq_len",
    "num_logits_to_keep",
    "rescale_prenorm_residual",
    "time_step_floor",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
}


LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "dim",
    "intermediate_size",
    "n_inner",
    "head_dim",
    "ffn_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)


def own_fields(config_class: type) -> list[str]:
    """The keys of a config class of transformers beside those that every one has."""
    from transformers import PreTrainedConfig

    common = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in common]


@lru_cache
def named_by_the_code(config_class: type) -> frozenset[str]:
    """The attributes that the code of a family in transformers names, as its text has them, since
    running it needs torch. All keys of the class where the code does not lie beside it.
    """
    files = Path(inspect.getfile(config_class)).parent.glob("modeling_*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return frozenset(re.findall(r"\.(\w+)", text) or own_fields(config_class))
