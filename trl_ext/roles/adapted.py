"""A base model with several LoRA adapters: running it under any of them, and what a Trainer asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from trl_ext.roles.adapters import is_quantized
from trl_ext.roles.aligned import AlignedBatch
from trl_ext.roles.lm_head import trunk_of
from trl_ext.roles.lora import AdapterPath, Block, CannotMixError
from trl_ext.roles.packing import Packing, can_pack, can_pad_left, fault_of_generate, stacked
from trl_ext.roles.sharding import is_sharded
from trl_ext.roles.switching import Under, active_adapter, evaluating, keep_differentiable, under
from trl_ext.tokens import longest_row

# Tokens a role up to which one forward for all roles is faster: few rows are bound by reading the weights, over a
# quantised base by dequantising them (tests/benchmarks/score_pass.py, on two CPU cores). Beyond, it only takes memory.
MIXED_TOKENS = 256
MIXED_TOKENS_QUANTISED = 512


class AdaptedModel(nn.Module):
    """One frozen causal language model under several adapters.

    Attributes:
        model: the PEFT model.
        packs: whether rows may be packed (see `packing`).
        deterministic: whether `train()` leaves everything that is random in training, or otherwise another function
            than in scoring (noise in routers, clamped coefficients), as it is in eval mode.
        longest: most tokens of a row; None where there is no limit but the model's own (see `longest_row`).
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        keep_differentiable(model)
        self.path = AdapterPath(model)
        self.packs = can_pack(self.causal_lm)
        self.deterministic = False
        self.longest = longest_row(self.config)
        if self._recomputes:
            self.activation_checkpointing_enable()  # each role under its own adapter

    @property
    def causal_lm(self) -> Any:
        """The Transformers model under the adapters."""
        return self.model.get_base_model()

    @cached_property
    def pads_left(self) -> bool:
        """Whether prompts of unlike length may be answered in one batch (see `can_pad_left`)."""
        return can_pad_left(self.causal_lm)

    @cached_property
    def generate_fault(self) -> str | None:
        """Why nothing is sampled from this model; None where it can be (see `fault_of_generate`)."""
        return fault_of_generate(self.causal_lm)

    @property
    def sharded(self) -> bool:
        """Whether processes share out the weights (FSDP2): each forward is then one of all of them together."""
        return is_sharded(self)

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the model's blocks, by which accelerate finds what FSDP2 gathers at a time."""
        there = {type(module).__name__ for module in self.causal_lm.modules()}
        return [name for name in self.causal_lm._no_split_modules or () if name in there]

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """The device that ids must be on."""
        return self.causal_lm.get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> AdaptedModel:
        """As `nn.Module.train`. A deterministic base needs gradients, not training mode: there only what asks for it to
        recompute activations is in training mode, and bitsandbytes' layers."""
        super().train(mode)
        if mode and self.deterministic:
            for module in self.model.modules():
                if not hasattr(module, "gradient_checkpointing") and "bitsandbytes" not in type(module).__module__:
                    module.training = False
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute activations in backward, each under the adapter that was active in its forward. Arguments as those
        of a Transformers model.

        Raises:
            ValueError: reentrant checkpointing is asked for; it cannot restore the role and would train on wrong
                gradients.
        """
        kwargs = dict(activation_checkpointing_kwargs or {})
        if kwargs.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} recomputes under the wrong adapter when roles "
                "share a base: leave use_reentrant out or set it to False."
            )
        kwargs.update(use_reentrant=False, context_fn=self._checkpoint_contexts)
        self._recomputation("enable")(kwargs, every_n_layers=every_n_layers, offload=offload)
        self.causal_lm.disable_input_require_grads()  # which only reentrant checkpointing needs

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._recomputation("disable")()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **how: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **how)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` by its older name."""
        self.activation_checkpointing_disable()

    @property
    def _recomputes(self) -> bool:
        newer = getattr(type(self.causal_lm), "is_activation_checkpointing", None) is not None
        return bool(getattr(self.causal_lm, f"is_{'activation' if newer else 'gradient'}_checkpointing", False))

    def _recomputation(self, what: str) -> Any:
        # Transformers before 5.23 has the older name alone, later ones warn of it.
        older = getattr(self.causal_lm, f"gradient_checkpointing_{what}")
        return getattr(self.causal_lm, f"activation_checkpointing_{what}", older)

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        # Entered at each backward: with retain_graph one forward may have several.
        return nullcontext(), Under(self.model, active_adapter(self.model))

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Forwards inside train nothing: no dropout, and what is made of the adapters' weights is made once."""
        with torch.no_grad(), evaluating(self), self.path.constant():
            yield

    # Forwards -------------------------------------------------------------------------------------------------

    def hidden_states(self, views: dict[str | None, AlignedBatch]) -> dict[str | None, Tensor]:
        """Last hidden states (batch, longest, size) of each batch under its adapter (None: the bare base).

        Without gradients there is no dropout, and all batches share one forward where that is as exact and as fast.
        """
        if torch.is_grad_enabled():
            return self._trunks(views)
        with evaluating(self):
            if len(views) > 1 and self._mixes(views):
                try:
                    return self._mixed_trunks(views)
                except CannotMixError:  # an expert that no token reached when it was tried
                    self.path.mixes = False
            return self._trunks(views)

    def _trunks(self, views: dict[str | None, AlignedBatch]) -> dict[str | None, Tensor]:
        hidden = {}
        for adapter, view in views.items():
            with under(self.model, adapter):
                hidden[adapter] = self.trunk(view)
        return hidden

    def _mixes(self, views: dict[str | None, AlignedBatch]) -> bool:
        max_tokens = MIXED_TOKENS_QUANTISED if is_quantized(self.causal_lm) else MIXED_TOKENS
        # Batches of unlike length in each process: all must decide alike.
        return not self.sharded and self.path.mixes and all(view.ids.numel() <= max_tokens for view in views.values())

    def _mixed_trunks(self, views: dict[str | None, AlignedBatch]) -> dict[str | None, Tensor]:
        packings = [self._packing(view) for view in views.values()]
        blocks = [Block(adapter, len(packing.ids)) for adapter, packing in zip(views, packings, strict=True)]
        with self.path.rows_under(blocks):
            hidden = self._states(packings)
        parts = hidden.split([block.rows for block in blocks])
        return {adapter: packing.unpacked(part) for adapter, packing, part in zip(views, packings, parts, strict=True)}

    def trunk(self, batch: AlignedBatch) -> Tensor:
        """Last hidden states (batch, longest, size) under the active adapter."""
        packing = self._packing(batch)
        return packing.unpacked(self._states([packing]))

    def _packing(self, batch: AlignedBatch) -> Packing:
        return Packing.of(batch.ids, batch.last + 1) if self.packs else Packing.none(batch.ids)

    def _states(self, packings: list[Packing]) -> Tensor:
        ids, position_ids = stacked(packings)
        if self.longest is not None and ids.shape[1] > self.longest:
            raise ValueError(
                f"A row has {ids.shape[1]} tokens, but with more than {self.longest} {type(self.causal_lm).__name__} "
                "rescales the positions of every row in its batch (dynamic or LongRoPE scaling): shorten the prompts "
                "or lower max_completion_length."
            )
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return trunk_of(self.causal_lm)(input_ids=ids, use_cache=False, **positions).last_hidden_state
