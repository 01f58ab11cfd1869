"""Whether vLLM speaks for the same model: its log-probabilities of a few tokens beside the base's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import torch
from transformers import GenerationConfig

from trl_ext.generation.rollouts import Answers
from trl_ext.tokens import side_by_side

PROMPTS, TOKENS = 8, 16
# Nats about a token, in the median, for rounding makes much of a few tokens. Over a float32 base of 135M bfloat16 makes
# 0.04, with and without a small adapter (0.155 with one that makes several nats; the probe's makes half a nat).
TOLERANCE = 0.1
COOLER = 0.5  # a temperature at which raw log-probs are not those that sampled

Ask = Callable[[list[list[int]], GenerationConfig, bool], Answers]


def check_same(base: Any, ask: Ask, tolerance: float, who: str) -> bool:
    """Compare what vLLM says of a few tokens with the base's own, under the bare base and under an adapter that is
    unlike it: the policy's, moved at random for the moment.

    Args:
        base: the `SharedBase`.
        ask: completions of prompts by vLLM with their log-probs, under the policy's adapter as it is then (True) or
            under the bare base.
        tolerance: most nats that the two may differ about a token, in the median.
        who: what vLLM is called in an error.

    Returns:
        Whether the log-probs are those that really sampled, whatever the sampling settings.

    Raises:
        ValueError: they differ by more.
    """
    prompts, plain, cooler = probe_prompts(base), probe_sampling(), probe_sampling(COOLER)
    with _bare(base):
        bare = ask(prompts, plain, False)
        check_base(base, "bare", prompts, bare, tolerance, who)
        cool = ask(prompts, cooler, False)
        as_sampled, raw = (
            fmean(differences(base, "bare", prompts, cool, temperature)) for temperature in (COOLER, 1.0)
        )
        with _moved(base, lambda: median(differences(base, "policy", prompts, bare)) >= 5 * tolerance):
            check_adapter(base, "policy", prompts, ask(prompts, plain, True), tolerance, who)
    return as_sampled < raw


def check_base(base: Any, role: str, prompts: Sequence[list[int]], said: Answers, tolerance: float, who: str) -> None:
    """Refuse what was said by another model than the bare base, which `role` is."""
    _check(
        differences(base, role, prompts, said),
        tolerance,
        f"{who} does not speak for this base",
        f"let it serve {base.config.name_or_path!r} itself, in a like precision and quantization",
    )


def check_adapter(
    base: Any, role: str, prompts: Sequence[list[int]], said: Answers, tolerance: float, who: str
) -> None:
    """Refuse what was said by something else than the adapter of `role`."""
    _check(
        differences(base, role, prompts, said),
        tolerance,
        f"{who} speaks for this base, but not for an adapter over it",
        "see in its log what it makes of the adapters that it is given",
    )


def differences(
    base: Any, role: str, prompts: Sequence[list[int]], said: Answers, temperature: float = 1.0
) -> list[float]:
    """How far the base's own log-prob of each token is from what was said, nats."""
    assert said.logprobs is not None
    ids, mask, width = side_by_side(prompts, said.ids)
    with torch.no_grad():
        own = base.logprobs(ids.to(base.device), mask.to(base.device), width, role, temperature).tolist()
    pairs = [pair for row, told in zip(own, said.logprobs, strict=True) for pair in zip(row, told, strict=False)]
    return [abs(x - y) for x, y in pairs]


def probe_prompts(base: Any) -> list[list[int]]:
    """A few short prompts of ids that lie apart in the vocabulary."""
    config = base.config.get_text_config()
    first, words = config.bos_token_id, config.vocab_size
    ids = [(2 * i + 1) * words // (2 * PROMPTS) for i in range(PROMPTS)]
    return [[i] if first is None else [int(first), i] for i in ids]


def probe_sampling(temperature: float = 1.0) -> GenerationConfig:
    """Plain sampling of a few tokens. There is no EOS: all completions are as long as they may be."""
    return GenerationConfig(do_sample=True, temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=TOKENS)


def _check(found: Sequence[float], tolerance: float, fault: str, remedy: str) -> None:
    if (middle := median(found)) > tolerance:
        raise ValueError(
            f"{fault}: its log-probabilities of {len(found)} tokens are {middle:.2g} nats from those computed here in "
            f"the median, {max(found):.2g} at most: {remedy}, or raise vllm_probe_tolerance ({tolerance:g})."
        )


@contextmanager
def _bare(base: Any) -> Iterator[None]:
    """Let the base speak as "bare": without an adapter, whatever its reference is."""
    base.adapters["bare"] = None
    try:
        yield
    finally:
        del base.adapters["bare"]


@contextmanager
def _moved(base: Any, enough: Callable[[], bool]) -> Iterator[None]:
    """Move the policy's adapter at random, always in the same way, until it says something else."""
    parameters, scale = base.trainable_parameters("policy"), 0.01
    before = [parameter.detach().clone() for parameter in parameters]

    def put(scale: float) -> None:
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                noise = torch.randn(parameter.shape, generator=draws).to(parameter)
                parameter.copy_(value + scale * noise if scale else value)

    try:
        put(scale)
        while not enough() and scale < 100:
            scale *= 1.5
            put(scale)
        yield
    finally:
        put(0.0)
