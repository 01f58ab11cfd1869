"""The LM head: what turns a trunk's hidden states into log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.core import token_logprobs


@dataclass(frozen=True)
class LMHead:
    """Frozen output projection of a causal language model and the transform after it (see `token_logprobs`)."""

    module: nn.Module
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, causal_lm: Any) -> LMHead:
        """Read the head and its transform off a Transformers model.

        Raises:
            NotImplementedError: the model does something else to its logits; training on it would be silently wrong.
        """
        config = causal_lm.config.get_text_config()
        head = cls(causal_lm.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), _scale(config))
        head._check(causal_lm)
        return head

    def logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, (tokens,) each, of `targets` (tokens,) given `hidden` (tokens, size)."""
        weight: Any = self.module.weight
        bias = getattr(self.module, "bias", None)
        return token_logprobs(
            hidden.to(weight.device), weight, targets, bias, temperature, self.softcap, self.scale, entropy_grad
        )

    @torch.no_grad()
    def _check(self, causal_lm: Any) -> None:
        device = causal_lm.get_input_embeddings().weight.device
        ids = torch.arange(1, 5, device=device).unsqueeze(0) % causal_lm.config.get_text_config().vocab_size
        mode = causal_lm.training
        causal_lm.eval()
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
        hidden = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        causal_lm.train(mode)
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1).to(logits.device)).squeeze(1)
        computed, _ = self.logprobs(hidden, ids[0, 1:].to(self.module.weight.device), temperature=1.0)
        # Half precision rounds logits of size 10 to about 0.05.
        tolerance = 1e-3 if logits.dtype == hidden.dtype else 0.25
        difference = float((computed - expected.to(computed.device)).abs().max())
        if difference > tolerance:
            raise NotImplementedError(
                f"{type(causal_lm).__name__} changes its logits in a way that trl_ext does not know (largest "
                f"difference in log-probability {difference:.3g} nats): it "
                "cannot be trained here; please report the model."
            )


def _scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0
