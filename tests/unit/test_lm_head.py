"""The LM head of models that do something to their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

from trl_ext.roles.lm_head import LMHead

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS = {
    "as they are": LlamaConfig(**SHAPE),
    "capped": Gemma2Config(**SHAPE, final_logit_softcapping=1.5, head_dim=8, attn_implementation="eager"),
    "multiplied": CohereConfig(**SHAPE, logit_scale=3.0),
    "divided": GraniteConfig(**SHAPE, logits_scaling=2.5),
    "shifted by a bias": PhiConfig(**SHAPE),
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_models_own_logits(kind: str, temperature: float) -> None:
    model = model_of(CONFIGS[kind])
    ids = torch.randint(1, 32, (1, 9), generator=torch.Generator().manual_seed(1))
    plain = (model(ids).logits[0, :-1] / temperature).log_softmax(dim=-1)
    hidden = model.base_model(ids).last_hidden_state[0, :-1]
    logprobs, entropies = LMHead.of(model).logprobs(hidden, ids[0, 1:], temperature)
    torch.testing.assert_close(logprobs, plain.gather(1, ids[0, 1:, None]).squeeze(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(dim=-1), atol=1e-5, rtol=1e-5)


def test_the_entropy_has_a_gradient_where_it_is_asked_for() -> None:
    model = model_of(CONFIGS["as they are"])
    head, ids = LMHead.of(model), torch.arange(3)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert head.logprobs(hidden, ids, 1.0, entropy_grad=True)[1].requires_grad
    assert not head.logprobs(hidden, ids, 1.0)[1].requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_what_else_is_done_to_logits_is_refused(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CONFIGS["as they are"]).train(training)
    LMHead.of(model)
    assert model.training is training
    plain = model.forward

    def shifted(**given: Any) -> Any:
        output = plain(**given)
        output.logits[..., 3] += 2.0
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(NotImplementedError) as raised:
        LMHead.of(model)
    assert str(raised.value).startswith(
        "LlamaForCausalLM changes its logits in a way that trl_ext does not know (largest difference in "
        "log-probability "
    )
    assert str(raised.value).endswith(" nats): it cannot be trained here; please report the model.")
    assert model.training is training


@torch.no_grad()
def test_half_precision_is_no_change() -> None:
    """Logits of bfloat16 models are rounded; what is looked for is larger."""
    LMHead.of(model_of(CONFIGS["divided"]).to(torch.bfloat16))
