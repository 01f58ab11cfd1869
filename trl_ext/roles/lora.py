"""The adapters' path: PEFT's plain LoRA layers with a leaner forward.

A LoRA layer computes y = W x + s B A x with thin matrices A (rank, inputs) and B (outputs, rank), and s = alpha / rank
or alpha / sqrt(rank). PEFT takes six steps: cast x to float32, multiply by A, by B, by s, add, cast back. For few rows
these are launches of small kernels, for many they read and write whole activations. Here

    [z_q; z_k; z_v] = s [A_q; A_k; A_v] x     one thin product for all layers that read the same x
    y_q = W_q x,  y_q += B_q z_q              one product that adds in place

in the precision that W x is computed in; A, B and their gradients stay in float32 (docs/numerics.md has what that
costs). What is not plain (DoRA, a bias, other kinds of layers, compiled models) takes PEFT's own forward.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from trl_ext.roles.lm_head import trunk_of
from trl_ext.roles.switching import evaluating

logger = logging.getLogger(__name__)
# Linear layers whose W x is a product with rows of x, whatever W is stored in.
KINDS = tuple(getattr(lora, name) for name in ("Linear", "Linear4bit", "Linear8bitLt") if hasattr(lora, name))
EVERY = slice(None)
Adapters = list[tuple[str, slice]]  # whose adapter speaks in which rows


class CannotMixError(RuntimeError):
    """A layer's input is not rows after rows, so rows of several adapters cannot be told apart in it."""


class Block(NamedTuple):
    """Rows of a batch, one after the other, under one adapter (None: the bare base)."""

    adapter: str | None
    rows: int


class AdapterPath:
    """Gives the plain LoRA layers of a PEFT model their leaner forward.

    Attributes:
        mixes: whether rows under several adapters may travel in one batch (`rows_under`).
    """

    def __init__(self, model: PeftModel) -> None:
        self.blocks: list[Block] | None = None
        self.kept: dict[Any, Any] | None = None
        causal_lm = model.get_base_model()
        layers = {name: module for name, module in causal_lm.named_modules() if type(module) in KINDS}
        inputs, by_row = _traced(causal_lm, layers)
        others = any(isinstance(module, BaseTunerLayer) and type(module) not in KINDS for module in model.modules())
        self.mixes = bool(inputs) and not others and all(name in by_row for name in inputs)
        for group in _groups(inputs, layers):
            shared = SharedInput([layers[name] for name in group], self)
            for name in group:
                layers[name].forward = LeanForward(layers[name], shared, self, name in by_row)
        for name in layers.keys() - inputs.keys():  # an expert that got no token, say
            layers[name].forward = LeanForward(layers[name], SharedInput([layers[name]], self), self, False)

    @contextmanager
    def rows_under(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Forwards inside, without gradients, read a batch made of these blocks, each under its own adapter.

        Raises:
            CannotMixError: by a forward, where a layer's input turns out not to be rows after rows.
        """
        self.blocks = list(blocks)
        try:
            yield
        finally:
            self.blocks = None

    @contextmanager
    def constant(self) -> Iterator[None]:
        """Nothing trains inside: what is made of the adapters' weights (a cast, a stack) is made once."""
        if self.kept is not None:
            yield
            return
        self.kept = {}
        try:
            with torch.no_grad():
                yield
        finally:
            self.kept = None

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once where weights are constant."""
        if self.kept is None:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Part(NamedTuple):
    """What an adapter adds to some rows of a layer's output: B `thin`, with `thin` (rows, rank)."""

    adapter: str
    rows: slice
    thin: Tensor


class SharedInput:
    """LoRA layers that read the same tensor: q, k and v; gate and up."""

    def __init__(self, layers: list[Any], path: AdapterPath) -> None:
        self.layers, self.path = layers, path
        self._source: weakref.ref[Tensor] | None = None
        self._key: Any = None
        self._parts: dict[Any, list[Part]] = {}
        self._rows: Tensor | None = None

    def read(self, x: Tensor, layer: Any, adapters: Adapters) -> tuple[Tensor, list[Part]]:
        """`x` as (rows, inputs), in the precision that a plain W x is computed in, and the parts of `layer`.

        Whoever asks first has those of all its siblings made in one product; each takes its own once.
        """
        key = adapters, torch.is_grad_enabled()
        if self._source is None or self._source() is not x or self._key != key or layer not in self._parts:
            self._make(x, adapters)
            self._source, self._key = weakref.ref(x), key
        rows, parts = self._rows, self._parts.pop(layer)
        assert rows is not None
        if not self._parts:
            self._source = self._rows = None
        return rows, parts

    def _make(self, x: Tensor, adapters: Adapters) -> None:
        rows, precise = x.flatten(0, -2), thin_precision(x)
        # A 4-bit or 8-bit layer answers in its input's precision, whatever it computes in.
        self._rows = rows.to(computed_in(x)) if type(self.layers[0]) is lora.Linear else rows
        read = self._rows if self._rows.dtype == precise else rows.to(precise)
        self._parts = {}
        for adapter, where in adapters:
            thin = _linear(read if where is EVERY else read[where], self.down(adapter, precise))
            members = self.members(adapter)
            ranks = [member.r[adapter] for member in members]
            for member, own in zip(members, thin.split(ranks, dim=1) if len(ranks) > 1 else [thin], strict=True):
                self._parts.setdefault(member, []).append(Part(adapter, where, own))

    def members(self, adapter: str) -> list[Any]:
        """The layers that have this adapter."""
        return [layer for layer in self.layers if adapter in layer.r]

    def down(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """s A of these layers, one below the other, (their ranks, inputs)."""
        return self.path.keep((self, adapter, dtype), lambda: self._down(adapter).to(dtype))

    def _down(self, adapter: str) -> Tensor:
        members = self.members(adapter)
        weights, scales = [m.lora_A[adapter].weight for m in members], [m.scaling[adapter] for m in members]
        if len(set(scales)) > 1:
            return torch.cat([weight * scale for weight, scale in zip(weights, scales, strict=True)])
        return (torch.cat(weights) if len(weights) > 1 else weights[0]) * scales[0]


class LeanForward:
    """The forward of one LoRA layer.

    Args:
        layer: PEFT's layer.
        shared: it and those that read the same input.
        path: what is common to all layers.
        row_by_row: whether its input is rows after rows, as far as could be seen.
    """

    def __init__(self, layer: Any, shared: SharedInput, path: AdapterPath, row_by_row: bool) -> None:
        self.layer, self.shared, self.path, self.row_by_row = layer, shared, path, row_by_row

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.path.kept is not None and not args and not kwargs:
            ready = self.path.kept.get(self)
            if ready is not None and self.path.blocks is None and ready.serves(x):
                return ready(x)
        layer, mixed = self.layer, self.path.blocks is not None
        adapters = self._rows_of(x) if mixed else active(layer)
        plain = not args and not kwargs and is_plain(layer, adapters)
        if mixed and not (self.row_by_row and plain):
            raise CannotMixError(type(layer).__name__)
        if mixed and not adapters:
            return layer.base_layer(x)
        dropping = layer.training and any(getattr(layer.lora_dropout[name], "p", 0.0) > 0 for name, _ in adapters)
        if not plain or not adapters or (dropping and len(adapters) > 1) or torch.compiler.is_compiling():
            return type(layer).forward(layer, x, *args, **kwargs)
        if dropping:  # other inputs than those that its siblings drop
            alone = SharedInput([layer], self.path)
            rows, parts = x.flatten(0, -2), alone.read(layer.lora_dropout[adapters[0][0]](x), layer, adapters)[1]
        else:
            rows, parts = self.shared.read(x, layer, adapters)
        result = layer.base_layer(rows)
        for part in parts:
            result = self._added(result, part)
        simple = len(adapters) == 1 and not mixed and not dropping
        if self.path.kept is not None and simple and x.dtype == rows.dtype == parts[0].thin.dtype == result.dtype:
            self.path.kept[self] = Ready(self, adapters[0][0], x.dtype)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _added(self, result: Tensor, part: Part) -> Tensor:
        """`result` and B thin in some of its rows; in place where autograd would not copy for that."""
        adapter, where, thin = part
        up = self.up(adapter, thin.dtype).t()
        rows = result if where is EVERY else result[where]
        if thin.dtype != result.dtype:
            rows.add_(_linear(thin, up.t()))
        elif torch.is_grad_enabled() and result._is_view():
            return torch.addmm(result, thin, up)
        else:
            rows.addmm_(thin, up)
        return result

    def up(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """B, (outputs, rank)."""
        return self.path.keep((self, adapter, dtype), lambda: self.layer.lora_B[adapter].weight.to(dtype))

    def _rows_of(self, x: Tensor) -> Adapters:
        """Whose adapter speaks in which rows of `x`, where a batch is mixed.

        Raises:
            CannotMixError: these are not the batch's rows.
        """
        blocks, start = self.path.blocks or [], 0
        adapters: list[tuple[str, slice]] = []
        tokens, rest = divmod(x.numel() // x.shape[-1], sum(block.rows for block in blocks))
        if rest:
            raise CannotMixError(type(self.layer).__name__)
        for block in blocks:
            stop = start + block.rows * tokens
            if block.adapter is not None and block.adapter in self.layer.r:
                adapters.append((block.adapter, slice(start, stop)))
            start = stop
        return adapters


class Ready:
    """The same under one plain adapter while weights are constant, with every decision taken: for few rows these cost
    more than the products. A token of an 8B model passes 252 layers."""

    def __init__(self, lean: LeanForward, adapter: str, dtype: torch.dtype) -> None:
        self.layer, self.base, self.adapters, self.dtype = lean.layer, lean.layer.base_layer, [adapter], dtype
        self.up, shared = lean.up(adapter, dtype).t(), lean.shared
        members = shared.members(adapter)
        self.number = members.index(lean.layer)
        ranks = [member.r[adapter] for member in members]
        self.shared: Any = lean.path.keep(
            (shared, adapter, dtype, "ready"), lambda: ReadyInput(shared.down(adapter, dtype), ranks)
        )

    def serves(self, x: Tensor) -> bool:
        """Whether this adapter still is the active one, and `x` of the precision it was made for."""
        layer = self.layer
        return layer._active_adapter == self.adapters and not layer._disable_adapters and x.dtype == self.dtype

    def __call__(self, x: Tensor) -> Tensor:
        rows, thin = self.shared.read(x)
        result = self.base(rows)
        result.addmm_(thin[self.number], self.up)
        return result.view(*x.shape[:-1], -1)


class ReadyInput:
    """s A x of layers that share x, made once."""

    def __init__(self, down: Tensor, ranks: list[int]) -> None:
        self.down, self.ranks = down, ranks
        self._source: weakref.ref[Tensor] | None = None
        self._made: Any = None
        self._left = 0  # layers that have not asked yet

    def read(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """`x` as (rows, inputs), and for each layer its (rows, rank)."""
        if self._source is None or self._source() is not x:
            rows = x.flatten(0, -2)
            self._made = rows, functional.linear(rows, self.down).split(self.ranks, dim=1)
            self._source, self._left = weakref.ref(x), len(self.ranks)
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._source = self._made = None
        return made


def active(layer: Any) -> Adapters:
    """The adapters that are active in a layer of PEFT, in all rows."""
    if layer.disable_adapters:
        return []
    return [(name, EVERY) for name in layer.active_adapters if name in layer.r]


def is_plain(layer: Any, adapters: Adapters) -> bool:
    """Whether these adapters of a layer are A and B alone, with nothing merged."""
    return not layer.merged_adapters and not any(n in layer.lora_variant or layer.lora_bias[n] for n, _ in adapters)


def computed_in(x: Tensor) -> torch.dtype:
    """What an ordinary linear layer computes W x in: autocast's precision or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def thin_precision(x: Tensor) -> torch.dtype:
    """What thin products are computed in: as W x, unless that overflows (float16) or the device is slow at it."""
    dtype = computed_in(x)
    return dtype if dtype != torch.float16 and multiplies(x.device.type, dtype) else torch.float32


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in their own precision, whatever autocast's is."""
    if computed_in(x) == x.dtype:
        return functional.linear(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, weight)


def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether a device multiplies in this precision faster than in float32. A CPU that does not takes twenty times as
    long for a thin product in bfloat16."""
    return device != "cpu" or dtype != torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()


def _groups(inputs: dict[str, int], layers: dict[str, nn.Module]) -> list[list[str]]:
    """Names of layers of one kind by what they read, block by block: recomputation takes a block at a time."""

    def block(name: str) -> list[str]:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        return parts[: number + 1]

    def key(name: str) -> tuple[int, str, list[str]]:
        return inputs[name], type(layers[name]).__name__, block(name)

    return [list(group) for _, group in groupby(sorted(inputs, key=key), key=key)]


@torch.no_grad()
def _traced(causal_lm: Any, layers: dict[str, nn.Module]) -> tuple[dict[str, int], set[str]]:
    """Which layers read the same tensor, tried on three rows of five tokens, and which of them read rows after rows.

    Returns:
        for each layer that was reached, a number that those share which read the same tensor; and the names of those
        where another second row changes the second third of what they read and nothing else.
    """
    ids = torch.arange(15, device=causal_lm.get_input_embeddings().weight.device).view(3, 5)
    ids = ids % (causal_lm.config.get_text_config().vocab_size - 1) + 1
    other = ids.clone()
    other[1] = ids[1].flip(0)
    try:
        first, second = _inputs(causal_lm, layers, ids), _inputs(causal_lm, layers, other)
    except Exception as error:  # whatever a model raises that wants more than ids
        logger.warning(
            "%s does not run on ids alone, so its adapters take PEFT's way: %s", type(causal_lm).__name__, error
        )
        return {}, set()
    known = {id(x): number for number, x in enumerate(first.values())}
    return {name: known[id(x)] for name, x in first.items()}, {
        name for name, x in first.items() if name in second and _row_by_row(x, second[name])
    }


def _inputs(causal_lm: Any, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: read.__setitem__(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(causal_lm):
            trunk_of(causal_lm)(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _row_by_row(one: Tensor, other: Tensor) -> bool:
    """Whether two inputs of a layer differ in the second of three rows alone."""
    if one.shape != other.shape or one.numel() % 3 or one.numel() // one.shape[-1] % 3:
        return False
    differs = ~torch.isclose(one.float(), other.float(), rtol=1e-3, atol=1e-5).reshape(3, -1)
    return bool(differs[1].any()) and not bool(differs[[0, 2]].any())
