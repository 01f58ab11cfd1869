"""The trunk of a causal language model, and the head that turns its hidden states into log-probabilities."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trl_ext.core import token_logprobs
from trl_ext.roles.switching import evaluating

logger = logging.getLogger(__name__)
LOGITS = 2**24  # most logits that a `ModelHead` computes at a time
# Half precision rounds logits of size 10 to about 0.05.
NATS, NATS_HALF = 1e-3, 0.25
LOUD = 30.0  # factor on hidden states at which a cap that small logits hide is heard


def trunk_of(causal_lm: Any) -> Any:
    """The model without its LM head. Some have it under another name than they say (Llama 4)."""
    return causal_lm.base_model if causal_lm.base_model is not causal_lm else causal_lm.model


class Head(Protocol):
    """What turns hidden states into log-probabilities."""

    def logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, (tokens,) each, of `targets` (tokens,) given `hidden` (tokens, size)."""
        ...


@torch.no_grad()
def head_of(causal_lm: Any) -> Head:
    """The head of a Transformers model: an `LMHead` where that says what the model says, else a `ModelHead`.

    Raises:
        NotImplementedError: neither does; training on the model would be silently wrong.
    """
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device).unsqueeze(0) % causal_lm.config.get_text_config().vocab_size
    with evaluating(causal_lm):
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
        output = trunk_of(causal_lm)(input_ids=ids, use_cache=False)
        lean, whole = LMHead.of(causal_lm), ModelHead(causal_lm, type(output))
        hidden, targets = output.last_hidden_state[0, :-1], ids[0, 1:]
        expected = logits.log_softmax(-1).gather(1, targets.unsqueeze(1).to(logits.device)).squeeze(1)
        nats = NATS if hidden.dtype == torch.float32 else NATS_HALF
        differs = {head: _difference(head, hidden, targets, expected) for head in (lean, whole)}
        if differs[lean] <= nats and differs[whole] <= nats and hidden.dtype == torch.float32:
            loud = whole.logprobs(LOUD * hidden, targets, 1.0)[0]
            differs[lean] = _difference(lean, LOUD * hidden, targets, loud) / LOUD
    if differs[lean] <= nats:
        return lean
    if differs[whole] > nats:
        raise NotImplementedError(
            f"{type(causal_lm).__name__} changes its logits in a way that trl_ext does not know (largest difference "
            f"in log-probability {differs[lean]:.3g} nats): it cannot be trained here; please report the model."
        )
    logger.info("%s has a head of its own kind: all logits of a token are computed at once.", type(causal_lm).__name__)
    return whole


def _difference(head: Head, hidden: Tensor, targets: Tensor, expected: Tensor) -> float:
    """Largest, in nats; infinite where the head cannot compute."""
    try:
        computed, _ = head.logprobs(hidden, targets.to(hidden.device), temperature=1.0)
    except Exception as error:  # whatever a model raises that does not run on given states, or has no weight
        logger.debug("%s: %s", type(head).__name__, error)
        return float("inf")
    return float((computed - expected.to(computed.device)).abs().max())


@dataclass(frozen=True, eq=False)
class LMHead:
    """Frozen output projection of a causal language model and the transform after it (see `token_logprobs`)."""

    module: nn.Module
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, causal_lm: Any) -> LMHead:
        """Read the head and its transform off a Transformers model."""
        config = causal_lm.config.get_text_config()
        return cls(causal_lm.get_output_embeddings(), _softcap(config), _scale(config))

    def logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Head`. Logits exist one tile at a time."""
        weight: Any = self.module.weight
        bias = getattr(self.module, "bias", None)
        return token_logprobs(
            hidden.to(weight.device),
            weight,
            targets.to(weight.device),
            bias,
            temperature,
            self.softcap,
            self.scale,
            entropy_grad,
        )


@dataclass(frozen=True, eq=False)
class ModelHead:
    """Whatever the model does after its trunk: its own forward, the trunk's replaced by one that returns given states.

    For heads with layers of their own (BERT and its kin). These may have adapters, so the role must be active.

    Attributes:
        output: what the trunk returns its states in.
    """

    causal_lm: Any
    output: type

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary), float32, of `hidden` (tokens, size)."""
        trunk = vars(trunk_of(self.causal_lm))
        before, given = trunk.get("forward"), self.output(last_hidden_state=hidden.unsqueeze(0))
        trunk["forward"] = lambda *_, **__: given
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            del trunk["forward"]
            if before is not None:
                trunk["forward"] = before

    def logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `Head`. All logits of some tokens exist at a time; with a gradient, those of all tokens."""
        tokens = max(1, LOGITS // self.causal_lm.config.get_text_config().vocab_size)
        parts = [(hidden.new_zeros(0, dtype=torch.float32),) * 2] if not len(hidden) else []
        for states, ids in zip(hidden.split(tokens), targets.split(tokens), strict=True):
            every = (self.logits(states) / temperature).log_softmax(-1)
            p = every.exp()
            entropy = -(p * every.masked_fill(p == 0, 0.0)).sum(-1)
            parts.append((every.gather(1, ids.unsqueeze(1).to(every.device)).squeeze(1), entropy))
        logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropy if entropy_grad else entropy.detach()


def _softcap(config: Any) -> float | None:
    """Gemma's name for it, and RecurrentGemma's."""
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def _scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0
