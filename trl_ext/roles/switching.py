"""Switching the one base between its adapters, and leaving everything as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

_CACHE = "_trl_ext_adapter_modules"  # attribute of a model


class AdapterModules(NamedTuple):
    """The modules that switching adapters touches. A model of 36 layers under three adapters has 4,500 modules: to
    search them at every switch took 0.14 s on a CPU core."""

    modules: list[nn.Module]
    layers: list[BaseTunerLayer]
    wrappers: list[Any]

    @classmethod
    def of(cls, model: nn.Module) -> AdapterModules:
        """Those of `model`, cached as its attribute until it has another number of adapters; a model without adapters
        may get some, so of that nothing is cached."""
        cached = vars(model).get(_CACHE)
        if cached is not None and cached[0] == len(cached[1].layers[0].scaling):
            kept: AdapterModules = cached[1]
            return kept
        modules = list(model.modules())
        layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        # PEFT's own modules around the model repeat the name of the active adapter.
        wrappers = [module for module in modules if isinstance(module, (PeftModel, BaseTuner))]
        own = cls(modules, layers, wrappers)
        if layers:
            vars(model)[_CACHE] = len(layers[0].scaling), own
        return own

    def parameters(self) -> list[nn.Parameter]:
        """The parameters as they are now: moving a model may replace them."""
        return [p for module in self.modules for p in module._parameters.values() if p is not None]


def belongs_to(parameter_name: str, adapter: str | None) -> bool:
    """Whether a parameter is part of the LoRA adapter of this name. (A model's own layer may be called "value".)"""
    return parameter_name.rpartition("lora_")[2].split(".")[1:2] == [adapter] and "lora_" in parameter_name


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that a forward would use now; None for the bare base."""
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return None if layer.disable_adapters else layer.active_adapters[0]


def activate(model: nn.Module, adapter: str | None) -> None:
    """Make `adapter` (None: the bare base) the one that forwards use, without touching any requires_grad.

    PEFT's own `set_adapter` turns gradients on for the adapter it activates and off for the others; which parameters
    train does not depend on which role speaks.
    """
    touched = AdapterModules.of(model)
    for layer in touched.layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    if adapter is not None:
        for wrapper in touched.wrappers:
            wrapper.active_adapter = adapter


@contextmanager
def under(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Forwards inside use `adapter`; on exit, also after an exception, those of before are active again. Where it is
    active already, nothing is switched."""
    if active_adapter(model) == adapter:
        yield
        return
    before = _active_by_module(AdapterModules.of(model))
    try:
        activate(model, adapter)
        yield
    finally:
        _reactivate(before)


class Under:
    """`under`, which can be entered more than once, one time after the other."""

    def __init__(self, model: nn.Module, adapter: str | None) -> None:
        self.model, self.adapter = model, adapter

    def __enter__(self) -> None:
        self._inside = under(self.model, self.adapter)
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No module is in training mode inside, but those that always are (`keep_differentiable`)."""
    switched = [m for m in AdapterModules.of(model).modules if m.training and "train" not in vars(m)]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def generating_by(causal_lm: Any, config: Any) -> Iterator[None]:
    """Inside, `generate` goes by this GenerationConfig alone: what it leaves open is the model's own else, which may
    search beams or stop at words."""
    own = causal_lm.generation_config
    causal_lm.generation_config = config
    try:
        yield
    finally:
        causal_lm.generation_config = own


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters get no gradient from forwards inside."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _active_by_module(touched: AdapterModules) -> list[tuple[Any, Any, bool | None]]:
    layers = [(layer, layer._active_adapter, layer._disable_adapters) for layer in touched.layers]
    return layers + [(wrapper, wrapper.active_adapter, None) for wrapper in touched.wrappers]


def _reactivate(before: list[tuple[Any, Any, bool | None]]) -> None:
    for module, adapter, disabled in before:
        if disabled is None:
            module.active_adapter = adapter
        else:
            module._active_adapter, module._disable_adapters = adapter, disabled


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On exit, also after an exception, active adapters, every requires_grad and every train/eval flag are back."""
    touched = AdapterModules.of(model)
    active = _active_by_module(touched)
    trainable = [(parameter, parameter.requires_grad) for parameter in touched.parameters()]
    training = [(module, module.training) for module in touched.modules]
    try:
        yield
    finally:
        _reactivate(active)
        for module, mode in training:
            if module.training != mode:
                module.training = mode
        for parameter, flag in trainable:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def keep_differentiable(model: nn.Module) -> None:
    """Keep every 4-bit layer of bitsandbytes in training mode for good.

    In eval mode on a CPU with AVX512-BF16, such a layer repacks its weight for inference on the first forward, and from
    then on has no backward: whoever generates and then trains gets no gradient below it. The flag changes nothing else.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            module.train(True)
            module.train = MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
