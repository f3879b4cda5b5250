"""Models of transformers, split where the loss needs them split: a trunk (tokens → hidden states)
and a head (→ logits).

In: a model folder. Out: a `SplitModel` whose head was checked against the whole model, or a
`ModelError`. Decided here: how the split is made, which models may be students, and what a saved
student looks like. Mirrors `backends/mlx/model.py`.
"""

import copy
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import ModelOutput

from mlx_distill.backends import export, refusals
from mlx_distill.backends.adapters import adapted_paths, initial_matrix
from mlx_distill.backends.torch.loss import CallableHead, Finish, Head, MatrixHead
from mlx_distill.errors import ModelError
from mlx_distill.files import all_lines
from mlx_distill.models.folder import read_config, read_generation_config, read_weights
from mlx_distill.models.ranges import ACTIVATIONS, refuse_impossible
from mlx_distill.recipe.tables import StudentTable

PROBE = [[1, 5, 2, 7, 3, 1, 4]]
PROBE_LOGIT = 100.0  # the largest one when a head is probed: far into any cap
PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a wrong split is off by orders of magnitude
HALF_TOLERANCE = 2e-2  # the same in bfloat16 or float16: a few units in the last place
LORA_PARTS = {
    "lora_A.default.weight": "lora_a",
    "lora_B.default.weight": "lora_b",
    "lora_magnitude_vector.default.weight": "m",
}

transformers.utils.logging.disable_progress_bar()


class SplitModel:
    """A transformers model as trunk and head.

    `hidden(tokens [B, T]) -> [B, T, D]`: the last hidden states, final norm included.
    `head(hidden [..., D]) -> [..., V]`: logits, by the family's own code (tied or not, soft-capped
    or scaled): the model is called with its trunk replaced by one that answers `hidden`.
    """

    def __init__(self, model: transformers.PreTrainedModel, name: str):
        # no dropout: a student moves toward its teacher, not toward noise
        self.model = model.eval()
        self.name = name
        self.trunk_name = model.base_model_prefix
        if not isinstance(getattr(model, self.trunk_name, None), nn.Module):
            raise refusals.no_trunk(name, type(model))
        self.stored_dtype: torch.dtype | None = None  # of the weights on disk, where that matters
        self._check_split()

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.model, self.trunk_name)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of the decoder."""
        lists = [module for module in self.trunk.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def device(self) -> torch.device:
        return self._head_weight.device

    def hidden(self, tokens: Tensor) -> Tensor:
        return self._run_trunk(tokens).last_hidden_state

    def _run_trunk(self, tokens: Tensor) -> ModelOutput:
        return self.trunk(input_ids=tokens, use_cache=False, return_dict=True)

    def head(self, hidden: Tensor) -> Tensor:
        return self._after_trunk()(hidden)

    def head_matrix(self) -> Tensor | None:
        """`[V, D]`, if the head is that matrix and nothing else; None for quantised, biased, capped
        or scaled heads.
        """
        return self._head_weight if self._head_is_matrix else None

    def head_rows(self) -> int:
        return self._probe_logits.shape[-1]

    def loss_head(self) -> Head:
        """The head as the loss walks it: a matrix and what an element needs after it (bias, cap,
        scale), or the family's own code.
        """
        for finish in (None, self._after_trunk(skip_head=True)):
            head = self._matrix_head(finish)
            if head is not None and self._equals_head(head):
                return head
        return CallableHead(self.head)

    @cached_property
    def head_path(self) -> str:
        """The name of the head's matrix among the parameters (of a tied one: the embedding's)."""
        return next(
            name
            for name, parameter in self.model.named_parameters()
            if parameter is self._head_weight
        )

    @property
    def _head_weight(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    @cached_property
    def _head_is_matrix(self) -> bool:
        module = self.model.get_output_embeddings()
        return (
            type(module) is nn.Linear
            and module.bias is None
            and self._equals_head(MatrixHead(module.weight))
        )

    def _matrix_head(self, finish: Finish | None) -> MatrixHead | None:
        module = self.model.get_output_embeddings()
        return MatrixHead(module.weight, module.bias, finish) if type(module) is nn.Linear else None

    def _after_trunk(self, skip_head: bool = False) -> "_AfterTrunk":
        return _AfterTrunk(self.model, self.trunk_name, self._trunk_answer, skip_head)

    @torch.no_grad()
    def _equals_head(self, head: Head) -> bool:
        """Whether `head` gives the family's logits, all of them or the first third, for large
        random hidden states.
        """
        rows = self.head_rows()
        probe = np.random.default_rng(0).normal(size=(3, self._probe_width)).astype(np.float32)
        probe = torch.from_numpy(probe).to(self.device)
        try:
            probe = probe * (PROBE_LOGIT / self._matrix_head(None).logits(probe, rows).abs().max())
            logits = self.head(probe.to(self._head_weight.dtype))
            return all(
                _close(head.logits(probe, some), logits[:, :some]) for some in (rows, rows // 3)
            )
        # a family's code run on parts it was not written for: any failure says that it is not this
        # head
        except Exception:
            return False

    @torch.no_grad()
    def _check_split(self) -> None:
        probe = torch.tensor(PROBE, device=self.device)
        try:
            output, self._probe_logits = (
                self._run_trunk(probe),
                self.model(probe, use_cache=False).logits,
            )
        except Exception as error:  # a family's code, run on a config it was not written for
            raise refusals.not_computed(self.name, error) from None
        if not self._probe_logits.isfinite().all():
            raise refusals.not_finite(self.name)
        hidden, self._trunk_answer = (
            output.last_hidden_state,
            type(output),
        )  # which has a field for all that the family asks of it
        self._probe_width = hidden.shape[-1]
        try:
            equal, how = _close(self.head(hidden), self._probe_logits), "differs from"
        except Exception as error:  # as above
            equal, how = False, f"fails ({all_lines(error, 100)}) instead of giving"
        if not equal:
            raise refusals.not_split(self.name, type(self.model), how)


class _AfterTrunk:
    """What a family's own code does after its trunk, as a function of the trunk's output [..., D].

    With `skip_head` the projection returns what it is given: the function of logits [..., any
    number] that remains.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        trunk_name: str,
        answer: type[ModelOutput],
        skip_head: bool,
    ):
        self._trunk = _StandIn(answer)
        head = next(
            name
            for name, module in model.named_children()
            if module is model.get_output_embeddings()
        )
        self._view = copy.copy(model)  # shares every part but those replaced
        self._view._modules = (
            model._modules
            | {trunk_name: self._trunk}
            | ({head: nn.Identity()} if skip_head else {})
        )

    def __call__(self, output: Tensor) -> Tensor:
        self._trunk.output = output.reshape(1, -1, output.shape[-1])
        tokens = torch.zeros(
            self._trunk.output.shape[:2], dtype=torch.long, device=output.device
        )  # that nobody reads
        logits = self._view(tokens, use_cache=False).logits
        self._trunk.output = None
        return logits.reshape(*output.shape[:-1], -1)


class _StandIn(nn.Module):
    """Answers `output` in the place of a trunk."""

    def __init__(self, answer: type[ModelOutput]):
        super().__init__()
        self.answer, self.output = answer, None

    def forward(self, *args, **kwargs) -> ModelOutput:
        return self.answer(last_hidden_state=self.output)


def _close(left: Tensor, right: Tensor) -> bool:
    tolerance = PROBE_TOLERANCE if left.dtype == right.dtype == torch.float32 else HALF_TOLERANCE
    left, right = left.float(), right.float()
    return (
        left.shape == right.shape
        and ((left - right).abs().max() / right.abs().max().clamp(min=1e-6)).item() <= tolerance
    )


def load_teacher(
    folder: Path, name: str, quantize_bits: int, device: torch.device, dtype: torch.dtype | None
) -> SplitModel:
    """Any causal LM that transformers loads, frozen, in `dtype` (None = as stored); `quantize_bits`
    (4, 8; 0 = none) quantises on load.
    """
    options = _quantisation(folder, name, quantize_bits, device) if quantize_bits else {}
    model = _load(folder, name, device, dtype, **options).requires_grad_(False)
    return SplitModel(model, name)


def _quantisation(folder: Path, name: str, bits: int, device: torch.device) -> dict:
    """bitsandbytes' NF4 or int8, which need CUDA."""
    config = read_config(folder, name)
    if stored := config.get("quantization_config") or config.get("quantization"):
        raise refusals.quantised_already(name, bits, stored.get("bits", "fewer"))
    if device.type != "cuda":
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but torch quantises on CUDA alone and this is "
            f"a {device.type}: set 0"
        )
    if bits not in (4, 8):
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but on CUDA there are 4 and 8 (bitsandbytes): "
            "choose one"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but bitsandbytes is not installed: pip "
            'install "mlx-distill[torch]", or set 0'
        ) from None
    chosen = (
        {"load_in_8bit": True}
        if bits == 8
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    return {"quantization_config": transformers.BitsAndBytesConfig(**chosen)}


def load_student(
    folder: Path,
    name: str,
    table: StudentTable,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> SplitModel:
    """A model whose tensors equal the folder's by name and value, float32 where it trains, `dtype`
    where frozen; others are refused.
    """
    read_generation_config(folder, name)  # which its export will read, hours from now
    config = read_config(folder, name)
    if config.get("quantization") or config.get("quantization_config"):
        raise refusals.quantised_student(name)
    stored = stored_weights(folder, name)
    dtypes = {value.dtype for value in stored.values() if value.is_floating_point()}
    model = _load(
        folder, name, torch.device("cpu"), dtypes.pop() if len(dtypes) == 1 else torch.float32
    )  # whatever config.json says
    _refuse_rewritten(model, stored, name)
    stored_dtype = stored[next(iter(dict(model.named_parameters())))].dtype
    if table.tuning == "full":
        split = SplitModel(model.float().requires_grad_(True).to(device), name)
    else:
        split = SplitModel(model.to(device), name)
        add_adapters(split, table, seed)
        cast_frozen(split.model, dtype)
    if split.head_matrix() is None:
        raise refusals.head_is_no_matrix(name)
    split.stored_dtype = stored_dtype
    return split


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds; packed quantised weights count as what they stand for,
    adapters do not count.
    """
    return model.num_parameters() - sum(
        array.numel() for name, array in model.named_parameters() if canonical(name) != name
    )


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """The frozen arrays as `dtype`, the adapters as float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _load(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, **options
) -> transformers.PreTrainedModel:
    weights = read_weights(folder, name)
    config = read_config(folder, name)
    refuse_impossible(config, f"{name}: {folder / 'config.json'}")
    weights.refuse_unusable(config, name)
    _refuse_unknown_activation(config, folder, name)
    if device.type == "cuda":
        options |= {"device_map": {"": device}}
    quiet = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is refused below
    with weights.alone() as alone:
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except (
            Exception
        ) as error:  # a family's code, run on a config it was not written for, fails in any way
            raise refusals.unloadable(name, folder, "transformers", error, alone) from None
        finally:
            transformers.utils.logging.set_verbosity(quiet)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if wrong := sorted(map(str, found[kind])):
            reason = f"{len(wrong)} tensors are {kind.partition('_')[0]}, {wrong[0]} among them"
            raise refusals.unloadable(name, folder, "transformers", ValueError(reason))
    return model


def _refuse_unknown_activation(config: dict, folder: Path, name: str) -> None:
    for key in ACTIVATIONS:
        asked = config.get(key)
        if isinstance(asked, str) and asked not in ACT2CLS:
            raise ModelError(
                f"{name}: {folder / 'config.json'}: {key} is {asked!r}, which transformers does "
                "not know"
            )


def stored_weights(folder: Path, name: str = "") -> dict[str, Tensor]:
    """The tensors of a model folder's files, buffers of rotary embeddings left out."""
    files = read_weights(folder, name or str(folder)).files
    stored = {key: value for file in files for key, value in load_file(file).items()}
    return {key: value for key, value in stored.items() if "rotary_emb.inv_freq" not in key}


def _refuse_rewritten(
    model: transformers.PreTrainedModel, stored: dict[str, Tensor], name: str
) -> None:
    """Refuse a family whose tensors transformers renames or changes on load: its export would not
    open everywhere.
    """
    loaded = dict(model.named_parameters())
    if (
        model.config.tie_word_embeddings and "lm_head.weight" in stored
    ):  # a tied head stored all the same, or is it one?
        loaded["lm_head.weight"] = model.get_input_embeddings().weight
    for key in sorted(stored.keys() ^ loaded.keys()):
        raise refusals.rewritten(name, key, "renamed" if key in stored else "made", "transformers")
    for key, value in stored.items():
        if value.shape != loaded[key].shape or not torch.equal(
            value, loaded[key].detach().to(value.dtype)
        ):
            raise refusals.rewritten(name, key, "changed", "transformers")


def add_adapters(split: SplitModel, table: StudentTable, seed: int) -> None:
    """Freeze the model and add peft's LoRA or DoRA to the layers that `adapted_paths` chooses;
    lora_A is `initial_matrix`, lora_B zero.
    """
    model = split.model.requires_grad_(False)
    linear = {
        id(module): path for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    blocks = [
        [linear[id(module)] for module in block.modules() if id(module) in linear]
        for block in split.layers
    ]
    paths = adapted_paths(blocks, table, split.name)
    config = LoraConfig(
        r=table.rank,
        lora_alpha=table.alpha,
        target_modules=paths,
        use_dora=table.tuning == "dora",
        lora_dropout=0.0,
        bias="none",
    )
    inject_adapter_in_model(config, model)
    for path, module in adapted_modules(model).items():
        weight = module.lora_A.default.weight
        matrix = initial_matrix((weight.shape[1], weight.shape[0]), path, seed)
        weight.data = torch.from_numpy(matrix.T.copy()).to(weight.device)
        module.lora_B.default.weight.data = module.lora_B.default.weight.data.float()
        if table.tuning == "dora":  # peft's norms are rounded as the weights are
            module.lora_magnitude_vector.default.weight.data = module.weight.data.float().norm(
                dim=1
            )


def adapted_modules(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Path → the layer with an adapter."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }


def canonical(name: str) -> str:
    """A trained parameter's name in a checkpoint, which is mlx-lm's: `PATH.lora_A.default.weight` →
    `PATH.lora_a`.
    """
    for ours, theirs in LORA_PARTS.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def is_transposed(name: str) -> bool:
    """Whether a trained parameter is kept transposed: mlx-lm's lora_a is [in, rank], peft's [rank,
    in].
    """
    return canonical(name) != name


def checkpoint_layers(split: SplitModel) -> None:
    """Recompute each block in the backward pass; nothing in a forward pass is random, so no random
    state is kept for it.
    """
    for layer in split.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def fused_weights(split: SplitModel, base: Path) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name, adapters fused into the matrices they adapt; the model
    keeps its adapters.

    What has no adapter is as the folder `base` stores it, whatever type the frozen copy is computed
    in.
    """
    adapted = adapted_modules(split.model)
    if not adapted:
        return {name: parameter.detach() for name, parameter in split.model.named_parameters()}
    stored = stored_weights(base, split.name)
    return stored | {
        f"{path}.weight": _fused(module, stored[f"{path}.weight"])
        for path, module in adapted.items()
    }


@torch.no_grad()
def _fused(module: AdaptedLinear, weight: Tensor) -> Tensor:
    """The matrix that does what a LoRA or DoRA layer over `weight` does, in float32: peft's merge
    adds in the frozen one's type.
    """
    change = module.lora_B.default.weight @ module.lora_A.default.weight * module.scaling["default"]
    fused = weight.float().to(change.device) + change
    if len(module.lora_magnitude_vector):
        fused *= (module.lora_magnitude_vector.default.weight / fused.norm(dim=1))[:, None]
    return fused


def save_folder(
    weights: dict[str, Tensor],
    base: Path,
    folder: Path,
    dtype: torch.dtype | None,
    stop_ids: list[int],
) -> None:
    """A Hugging Face folder; dtype None keeps each tensor's type in the base model."""
    tensors = {
        key: value.to("cpu", dtype or value.dtype).contiguous() for key, value in weights.items()
    }
    export.save_folder(
        tensors, _save, base, folder, str(dtype).rpartition(".")[2] if dtype else "", stop_ids
    )


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
