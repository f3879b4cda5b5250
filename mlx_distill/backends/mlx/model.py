"""A model of mlx-lm, split where the loss needs it split: a trunk (tokens → hidden states) and a head
(→ logits).

In: a loaded model. Out: a `SplitModel` whose head was checked against the whole model, or a
`ModelError`. Decided here: how the split is made, and whether the head is a matrix that the loss
may cut into blocks.
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.backends import refusals
from mlx_distill.backends.failures import refuse_of_device
from mlx_distill.backends.mlx.heads import CallableHead, Head, MatrixHead, QuantizedHead
from mlx_distill.files import all_lines

PROBE = [[1, 5, 2, 7, 3, 1, 4]]
PROBE_LOGIT = 100.0  # the largest one when a head is probed: far into any cap
PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a wrong split is off by orders of magnitude
HALF_TOLERANCE = 2e-2  # the same in bfloat16 or float16: a few units in the last place
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embeddings",
    "tok_embeddings",
    "word_embeddings",
)  # names of a trunk's tied matrix


class SplitModel:
    """An mlx-lm model as trunk and head.

    `hidden(tokens [B, T]) -> [B, T, D]`: the last hidden states, final norm included.
    `head(hidden [..., D]) -> [..., V]`: logits, by the family's own code (tied or not, quantised or
    not, soft-capped or scaled): the model is called with its trunk replaced by one that answers
    `hidden`.
    """

    def __init__(self, model: nn.Module, name: str, notes: tuple[str, ...] = ()):
        self.model = model
        self.name = name
        self.notes = notes  # what a person should know of how it is computed
        self.owner, self.trunk_name = _find_trunk(model, name)
        self.stored_dtype: mx.Dtype | None = None  # of the weights on disk, where that matters
        self._trunk_extras = [None] * (
            _required_arguments(self.trunk) - 1
        )  # a few families insist on a cache
        self._head = _AfterTrunk(self.owner, self.trunk_name)
        self._check_split()

    def refuse_overflow(self) -> None:
        """Raise `ModelError` where its logits are not finite in the format that it now computes in."""
        if not mx.all(mx.isfinite(self.model(mx.array(PROBE)))).item():
            raise refusals.beyond_float16(self.name)

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.owner, self.trunk_name)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def hidden(self, tokens: mx.array) -> mx.array:
        return self.trunk(tokens, *self._trunk_extras)

    def head(self, hidden: mx.array) -> mx.array:
        return self._head(hidden)

    def head_matrix(self) -> mx.array | None:
        """`[V, D]`, if the head is that matrix and nothing else, unpacked where it is quantised; None
        for biased, capped or scaled heads.
        """
        module = self._head_module
        return unpacked(module) if module is not None and self._head_is_matrix else None

    @property
    def width(self) -> int:
        """D"""
        return self._probe_width

    def head_rows(self) -> int:
        return self._probe_logits.shape[-1]

    def loss_head(self) -> Head:
        """The head as the loss walks it: by blocks of the vocabulary where it is a matrix and what
        an element needs after it (bias, cap, scale), in one piece otherwise.
        """
        for finish in (None, self._finish()):
            head = self._head_by_blocks(finish)
            if head is not None and self._equals_head(head):
                return head
        return CallableHead(self.head)

    @cached_property
    def head_path(self) -> str:
        """The path of the head's matrix among a student's parameters (whose head is one plain
        matrix).
        """
        return (
            next(path for path, module in self.model.named_modules() if module is self._head_module)
            + ".weight"
        )

    @cached_property
    def _head_is_matrix(self) -> bool:
        module, head = self._head_module, self._head_by_blocks(None)
        return (
            module is not None
            and head is not None
            and set(module) in ({"weight"}, {"weight", "scales", "biases"})
            and self._equals_head(head)
        )

    @property
    def _head_name(self) -> str | None:
        """The name of the projection in its owner, or of the tied embedding in the trunk."""
        if "lm_head" in self.owner:
            return "lm_head"
        return next((name for name in EMBEDDINGS if name in self.trunk), None)

    @property
    def _head_module(self) -> nn.Module | None:
        name = self._head_name
        return None if name is None else (self.owner if name == "lm_head" else self.trunk)[name]

    def _head_by_blocks(self, finish: Callable[[mx.array], mx.array] | None) -> Head | None:
        module = self._head_module
        if module is None:
            return None
        if "scales" not in module:
            return MatrixHead(module.weight, module.get("bias"), finish)
        quantised = (
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
        )
        return QuantizedHead(*quantised, module.get("bias"), finish)

    def _finish(self) -> Callable[[mx.array], mx.array]:
        """What the family's own code does to logits after the projection, as a function of logits
        [..., any number].
        """
        return _AfterTrunk(self.owner, self.trunk_name, skipped=self._head_name)

    def _equals_head(self, head: Head) -> bool:
        """Whether `head`, met in two blocks, gives the family's logits for large random hidden
        states.
        """
        rows, middle = self.head_rows(), self.head_rows() // 3
        probe = mx.array(
            np.random.default_rng(0).normal(size=(3, self._probe_width)).astype(np.float32)
        )
        plain = self._head_by_blocks(None)
        if plain is None:
            return False
        try:
            probe = probe * (PROBE_LOGIT / mx.abs(plain.logits(probe, 0, rows)).max())
            blocks = mx.concatenate(
                [head.logits(probe, 0, middle), head.logits(probe, middle, rows)], axis=-1
            )
            return _close(blocks, self.head(probe))
        # a family's code run on parts it was not written for: any other failure says that it is not
        # this head
        except Exception as error:
            refuse_of_device(f"loading {self.name}", error)
            return False

    def _check_split(self) -> None:
        probe = mx.array(PROBE)
        try:
            hidden, self._probe_logits = self.hidden(probe), self.model(probe)
            finite = mx.all(mx.isfinite(self._probe_logits)).item()
        except Exception as error:  # a family's code, run on a config it was not written for
            refuse_of_device(f"loading {self.name}", error)
            raise refusals.not_computed(self.name, error) from None
        if not finite:
            raise refusals.not_finite(self.name)
        self._probe_width = hidden.shape[-1]
        try:
            equal, how = _close(self.head(hidden), self._probe_logits), "differs from"
        except Exception as error:  # as above
            refuse_of_device(f"loading {self.name}", error)
            equal, how = False, f"fails ({all_lines(error, 100)}) instead of giving"
        if not equal:
            raise refusals.not_split(self.name, type(self.model), how)


def unpacked(module: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """The matrix of a linear or embedding module; where it is quantised, in the format of its scales
    or another one.
    """
    if "scales" not in module:
        return module.weight
    numbers = (module[name].astype(dtype or module.scales.dtype) for name in ("scales", "biases"))
    return mx.dequantize(module.weight, *numbers, module.group_size, module.bits)


def checkpoint_layers(split: SplitModel) -> None:
    """Recompute each block in the backward pass."""

    def again(forward: Callable, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(parameters: dict, *args: Any) -> Any:
            layer.update(parameters)
            return forward(layer, *args, **kwargs)

        return mx.checkpoint(run)(layer.trainable_parameters(), *args)

    for layer in split.layers:
        call_through(layer, again, "Checkpointed")


def call_through(module: nn.Module, call: Callable, how: str) -> Callable[[], None]:
    """From now on `call(its own call, module, …)` answers for the module, which gets a class of its
    own, named after `how`: MLX has no hooks, and no other module changes. What is returned gives it
    its class back.
    """
    plain = type(module)

    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(plain.__call__, self, *args, **kwargs)

    def give_back() -> None:
        module.__class__ = plain

    module.__class__ = type(f"{how}{plain.__name__}", (plain,), {"__call__": answer})
    return give_back


class RoundedEmbedding:
    """A trunk's embedding, read in its own format while the trunk computes in another one: what is
    read is rounded. So a token's gradient, the sum over all of its places, is summed in float32
    (in bfloat16 such a sum is off by per cents: beyond 256 equal addends it does not grow).
    """

    def __init__(self, split: SplitModel):
        name = next((name for name in EMBEDDINGS if name in split.trunk), "")
        self.module = split.trunk[name] if name else nn.Module()
        paths = (path for path, module in split.model.named_modules() if module is self.module)
        self.path = f"{next(paths)}.weight" if name else ""  # of its matrix among the parameters
        self.round_to(None)
        plain = type(self.module)

        def call(module: nn.Module, tokens: mx.array, *rest: Any) -> mx.array:
            found = plain.__call__(module, tokens, *rest)
            return found if module.rounds_to is None else found.astype(module.rounds_to)

        self.module.__class__ = type(f"Rounded{plain.__name__}", (plain,), {"__call__": call})

    def round_to(self, dtype: mx.Dtype | None) -> None:
        """What is read from now on; None is as it is."""
        self.module.rounds_to = dtype


class _AfterTrunk:
    """What a family's own code does after its trunk, as a function of the trunk's output [..., D].

    The projection called `skipped`, the owner's or the trunk's, then returns what it is given.
    """

    def __init__(self, owner: nn.Module, trunk_name: str, skipped: str | None = None):
        passing = {skipped: _PassOn()} if skipped else {}
        self._trunk = _StandIn(getattr(owner, trunk_name), passing)
        self._owner = _with_parts(
            owner, {trunk_name: self._trunk} | (passing if skipped in owner else {})
        )

    def __call__(self, output: mx.array) -> mx.array:
        self._trunk.output = given = output.reshape(1, -1, output.shape[-1])
        logits = self._owner(mx.zeros(given.shape[:2], mx.int32))  # tokens that nobody reads
        self._trunk.output = None
        return logits.reshape(*output.shape[:-1], -1)


class _StandIn:
    """Answers `output` in the place of a trunk, and lends the trunk's attributes (a tied embedding)
    but for `parts`.
    """

    def __init__(self, trunk: nn.Module, parts: dict[str, "_PassOn"]):
        self._trunk = trunk
        self.output: mx.array | None = None
        self.__dict__.update(parts)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


class _PassOn:
    """A projection that returns what it is given."""

    def __call__(self, given: mx.array) -> mx.array:
        return given

    as_linear = __call__


def _find_trunk(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    for owner in (model, getattr(model, "language_model", None)):
        for trunk in ("model", "transformer", "backbone"):
            if owner is not None and isinstance(
                owner.get(trunk), nn.Module
            ):  # a part, no property that looks into one
                return owner, trunk
    raise refusals.no_trunk(name, type(model))


def _required_arguments(trunk: nn.Module) -> int:
    parameters = inspect.signature(trunk.__call__).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _with_parts(owner: nn.Module, parts: dict[str, _StandIn | _PassOn]) -> nn.Module:
    """A view of `owner` with other parts; every remaining one is shared with the original."""
    kind: Any = type(owner)
    view = kind.__new__(kind)
    nn.Module.__init__(view)
    view.__dict__.update(owner.__dict__)
    dict.update(view, owner)  # Module.update would descend into the shared parts
    for name, part in parts.items():
        dict.pop(view, name)
        object.__setattr__(view, name, part)
    return view


def _close(left: mx.array, right: mx.array) -> bool:
    tolerance = PROBE_TOLERANCE if left.dtype == right.dtype == mx.float32 else HALF_TOLERANCE
    left, right = left.astype(mx.float32), right.astype(mx.float32)
    scale = mx.maximum(mx.abs(right).max(), 1e-6)
    return left.shape == right.shape and (mx.abs(left - right).max() / scale).item() <= tolerance
