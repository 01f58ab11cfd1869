"""The log-probabilities that the base's own generators tell: each token's, as it was really sampled, worked out by hand
from a plain forward of the same model over the tokens before it."""

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import tiny_llama
from trl_ext import SharedBase
from trl_ext.generation import ContinuousGenerator, GenerationError, Generator, TransformersGenerator

PROMPTS = [[7, 9, 12], [8], [5, 6, 7, 8], [8], [10, 11], [14], [13, 5], [9, 9]]
EOS = [15, 16, 17]


def base() -> SharedBase:
    """Roles whose policy is not the base."""
    base = SharedBase.from_model(tiny_llama(), value="head")
    torch.manual_seed(1)
    for parameter in base.trainable_parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.4)
    return base


def logits_by_hand(base: SharedBase, ids: list[int]) -> list[float]:
    with torch.no_grad(), base.use("policy"):
        return base.causal_lm(torch.tensor([ids])).logits[0, -1].double().tolist()


def chance(z: list[float], before: list[int], token: int, how: dict[str, Any], new: int) -> float:
    """Probability of `token` after `before`, of which the last `new` are the completion's."""
    penalty, z = how.get("repetition_penalty", 1.0), list(z)
    for seen in set(before):
        z[seen] = z[seen] / penalty if z[seen] > 0 else z[seen] * penalty
    if new < how.get("min_new_tokens", 0):
        z = [-math.inf if i in EOS else x for i, x in enumerate(z)]
    e = [math.exp(x / how.get("temperature", 1.0)) for x in z]
    p = [x / sum(e) for x in e]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = set(order[: how.get("top_k") or len(p)])
    mass = sum(p[i] for i in kept)  # each filter renormalises before the next
    p = [x / mass if i in kept else 0.0 for i, x in enumerate(p)]
    nucleus, total = set(), 0.0
    for i in order:
        if total < how.get("top_p", 1.0):
            nucleus.add(i)
        total += p[i]
    p = [x if i in nucleus and x >= how.get("min_p", 0.0) * max(p) else 0.0 for i, x in enumerate(p)]
    return p[token] / sum(p)


@pytest.mark.parametrize(
    ("how", "continuous"),
    [
        ({}, False),
        ({"temperature": 0.6, "top_p": 0.7}, False),
        ({"top_k": 4, "top_p": 0.9}, False),
        ({"min_p": 0.3}, False),
        ({"repetition_penalty": 1.6, "top_k": 8}, False),
        ({"min_new_tokens": 3, "top_p": 0.8}, False),
        ({"temperature": 0.6}, True),
        ({"top_k": 4}, True),
    ],
)
def test_each_token_comes_with_the_probability_that_sampled_it(how: dict[str, Any], continuous: bool) -> None:
    roles = base()
    plain = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": EOS}
    config = GenerationConfig(**{**plain, **how})
    make: Any = (lambda: ContinuousGenerator(roles, 3, tell=True)) if continuous else None
    rows = 1 if "repetition_penalty" in how else 3  # older Transformers count padding among what is repeated
    generator: Generator = make() if make else TransformersGenerator(roles, rows, tell=True)
    torch.manual_seed(4)
    answers = generator.answers(PROMPTS, config, "policy")
    assert answers.logprobs is not None
    ended, checked = set(), 0
    for prompt, ids, told in zip(PROMPTS, answers.ids, answers.logprobs, strict=True):
        assert len(ids) == len(told)
        for t, (token, logprob) in enumerate(zip(ids, told, strict=True)):
            before = prompt + ids[:t]
            expected = chance(logits_by_hand(roles, before), before, token, how, t)
            assert math.exp(logprob) == pytest.approx(expected, rel=2e-4), (how, t)
            checked += 1
            if token in EOS:
                ended.add(t)
                break
    assert checked > 15 and len(ended) > 1, "completions end apart"


def test_telling_changes_no_token() -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=EOS)
    drawn = []
    for tell in (False, True):
        torch.manual_seed(4)
        drawn.append(TransformersGenerator(base(), 3, tell).answers(PROMPTS, config, "policy"))
    assert drawn[0].ids == drawn[1].ids
    assert drawn[0].logprobs is None


def test_a_search_tells_nothing() -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=2, pad_token_id=0, eos_token_id=EOS)
    with pytest.raises(GenerationError, match=r"^generation_kwargs ask for beam search, which tells no probability"):
        TransformersGenerator(base(), 3, tell=True).answers(PROMPTS, config, "policy")
