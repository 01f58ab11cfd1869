"""The LM head of models that do something to their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from trl_ext.roles.lm_head import LMHead, ModelHead, head_of, trunk_of

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
    head = head_of(model)
    assert isinstance(head, LMHead)
    logprobs, entropies = head.logprobs(hidden, ids[0, 1:], temperature)
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
    head_of(model)
    assert model.training is training
    plain = model.forward

    def shifted(**given: Any) -> Any:
        """By what was read, which hidden states alone do not tell."""
        output = plain(**given)
        output.logits[..., 3] += given["input_ids"].sum()
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(NotImplementedError) as raised:
        head_of(model)
    assert str(raised.value).startswith(
        "LlamaForCausalLM changes its logits in a way that trl_ext does not know (largest difference in "
        "log-probability "
    )
    assert str(raised.value).endswith(" nats): it cannot be trained here; please report the model.")
    assert model.training is training


@torch.no_grad()
def test_half_precision_is_no_change() -> None:
    """Logits of bfloat16 models are rounded; what is looked for is larger."""
    assert isinstance(head_of(model_of(CONFIGS["divided"]).to(torch.bfloat16)), LMHead)


def bert() -> Any:
    """Layers of its own between trunk and projection."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BertConfig(**SHAPE, is_decoder=True)).eval()


@pytest.mark.parametrize("at_a_time", [1000, 64])
def test_a_head_of_another_kind_is_the_models_own(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ext.roles.lm_head.LOGITS", at_a_time)  # all nine tokens, or two
    model, temperature = bert(), 0.7
    head = head_of(model)
    assert isinstance(head, ModelHead)
    ids = torch.randint(1, 32, (1, 9), generator=torch.Generator().manual_seed(1))
    plain = (model(ids).logits[0, :-1] / temperature).log_softmax(dim=-1)
    expected, entropy = plain.gather(1, ids[0, 1:, None]).squeeze(1), -(plain.exp() * plain).sum(dim=-1)
    weights, parameters = torch.linspace(-1, 1, 8), list(model.parameters())
    wanted = torch.autograd.grad((weights * expected).sum() + entropy.sum(), parameters, allow_unused=True)

    hidden = model.base_model(ids).last_hidden_state[0, :-1]
    logprobs, entropies = head.logprobs(hidden, ids[0, 1:], temperature, entropy_grad=True)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, entropy, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((weights * logprobs).sum() + entropies.sum(), parameters, allow_unused=True)
    for gradient, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)
    assert not head.logprobs(hidden, ids[0, 1:], temperature)[1].requires_grad
    assert torch.equal(model(ids).logits, model(ids).logits) and "forward" not in vars(model.base_model)


def test_no_tokens_have_no_log_probabilities() -> None:
    logprobs, entropies = head_of(bert()).logprobs(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long), 1.0)
    assert logprobs.shape == entropies.shape == (0,)


@torch.no_grad()
def test_a_cap_that_small_logits_hide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """RecurrentGemma caps at 30; random logits near 0 show nothing of it, those of a trained model do."""
    shape = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
    model = model_of(RecurrentGemmaConfig(**{**shape, "num_hidden_layers": 3, "lru_width": 16, "head_dim": 8}))
    assert isinstance(head_of(model), LMHead)
    monkeypatch.setattr("trl_ext.roles.lm_head._softcap", lambda config: None)
    assert isinstance(head_of(model), ModelHead)


def test_a_trunk_by_another_name() -> None:
    config = Llama4TextConfig(**SHAPE, head_dim=8, intermediate_size_mlp=32, num_local_experts=2)
    model = Llama4ForCausalLM(config)
    assert model.base_model is model, "then it needs no care any more"
    assert trunk_of(model) is model.model
