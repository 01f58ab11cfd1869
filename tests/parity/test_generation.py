"""Completions whose rows leave their batch, against plain forwards of the model over each prompt alone."""

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MambaConfig, RwkvConfig

from tests.helpers import DEVICE
from tests.parity.tiny import EOS, PAD, VOCABULARY, config_of
from trl_ext import SharedBase
from trl_ext.generation import GenerationError, TransformersGenerator, transformers_generate
from trl_ext.generation.transformers_generate import can_continue
from trl_ext.tokens import cut_at_eos

# "mistral" and "gemma2" have a sliding window of four tokens in all layers and in every other.
FAMILIES = ("llama", "gpt2", "mistral", "gemma2")
# Of unlike length, in no order, three of them asked several times.
PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17], [8, 9], [5, 6, 7], [20, 21, 22, 23], [8, 9], [11, 12], [5, 6, 7]]
WITH_ONE_TOKEN = [[9], *PROMPTS, [9]]
ENDS = list(range(1, VOCABULARY, 7))  # many, so that rows end apart


def built(config: Any) -> tuple[SharedBase, Any]:
    """A random model as a base, whose new policy says what the model says, and the model alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)  # what a token says depends on those before it
    return SharedBase.from_model(copy.deepcopy(model)), model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[SharedBase, Any]:
    return built(config_of(request.param))


@pytest.fixture
def llama() -> tuple[SharedBase, Any]:
    return built(config_of("llama"))


def greedy(**more: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": 14, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": PAD, **more}
    )


def completed(base: SharedBase, prompts: list[list[int]], config: GenerationConfig, rows: int = 8) -> list[list[int]]:
    answers = TransformersGenerator(base, rows).answers(prompts, config, "policy")
    return [cut_at_eos(ids, config.eos_token_id) for ids in answers.ids]


@torch.no_grad()
def next_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids], device=DEVICE), use_cache=False).logits[0, -1].float()


def by_plain_forwards(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Fourteen times the likeliest token, or up to the first of ENDS."""
    completions = []
    for prompt in prompts:
        ids: list[int] = []
        while len(ids) < 14 and not set(ENDS) & set(ids):
            ids.append(int(next_logits(model, prompt + ids).argmax()))
        completions.append(ids)
    return completions


def by_one_generate(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Transformers' own generate for all prompts at once."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [cut_at_eos(row, config.eos_token_id) for row in written[:, width:].tolist()]


def forwards(base: SharedBase, prompts: list[list[int]], config: GenerationConfig) -> list[tuple[int, int]]:
    """Rows and columns of every forward, in one batch."""
    assert base.pads_left and base.generate_fault is None  # tried now, or they would be counted
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    handle = base.causal_lm.register_forward_pre_hook(note, with_kwargs=True)
    completed(base, prompts, config, rows=len(prompts))
    handle.remove()
    return shapes


@pytest.mark.parametrize("prompts", [PROMPTS, WITH_ONE_TOKEN, PROMPTS[:2]], ids=["repeated", "one token", "unlike"])
@pytest.mark.parametrize("rows", [3, 64])
def test_greedy_completions_are_those_of_plain_forwards(
    rows: int, prompts: list[list[int]], family: tuple[SharedBase, Any]
) -> None:
    """Beyond the sliding window too, and in the order asked."""
    base, model = family
    wanted = by_plain_forwards(model, prompts)
    assert completed(base, prompts, greedy(), rows) == wanted
    assert len({len(ids) for ids in wanted}) > 1, "rows end apart"


@pytest.mark.parametrize("family", ["llama", "mistral"], indirect=True)
def test_sampled_completions_come_as_often_as_they_should(family: tuple[SharedBase, Any]) -> None:
    """Chi-square of all completions of up to three tokens over four ids, one of which is the EOS, against their
    probabilities by plain forwards."""
    base, model = family
    letters, temperature, copies, calls = [EOS, 3, 17, 40], 1.5, 12, 50
    config = GenerationConfig(
        max_new_tokens=3,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        suppress_tokens=[token for token in range(VOCABULARY) if token not in letters],
        eos_token_id=[EOS],
        pad_token_id=PAD,
    )
    unique = [[5, 6, 7, 8, 9, 10], [8, 9], [20, 21, 22]]
    drawn: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {tuple(prompt): Counter() for prompt in unique}
    torch.manual_seed(0)
    for _ in range(calls):
        asked = unique * copies
        for prompt, ids in zip(asked, completed(base, asked, config, rows=24), strict=True):
            drawn[tuple(prompt)][tuple(ids)] += 1
    for prompt in unique:
        chances = probabilities(model, prompt, letters, temperature)
        wanted = {ids: copies * calls * chance for ids, chance in chances.items()}
        assert sum(wanted.values()) == pytest.approx(copies * calls)
        counts = drawn[tuple(prompt)]
        assert set(counts) <= set(wanted)
        likely = [ids for ids in wanted if wanted[ids] >= 5]
        assert len(likely) > 8
        cells = [(counts[ids], wanted[ids]) for ids in likely]
        cells.append((sum(counts.values()) - sum(n for n, _ in cells), copies * calls - sum(n for _, n in cells)))
        chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
        freedom = len(cells) - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def probabilities(
    model: Any, prompt: list[int], letters: list[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """Of every completion of up to three `letters`."""
    chances: dict[tuple[int, ...], float] = {}
    for ids in itertools.chain.from_iterable(itertools.product(letters, repeat=n) for n in (1, 2, 3)):
        if EOS in ids[:-1] or (ids[-1] != EOS and len(ids) < 3):
            continue
        chance = 1.0
        for place, token in enumerate(ids):
            logits = next_logits(model, prompt + list(ids[:place]))[letters] / temperature
            chance *= float(logits.softmax(-1)[letters.index(token)])
        chances[ids] = chance
    return chances


def test_rows_that_have_ended_leave(llama: tuple[SharedBase, Any]) -> None:
    """No forward has a quarter of its rows for nothing."""
    base, model = llama
    prompts = [list(range(start, start + start % 5 + 2)) for start in range(3, 35, 2)]
    lengths = [len(ids) for ids in by_plain_forwards(model, prompts)]
    (first, width), *later = forwards(base, prompts, greedy())
    assert (first, width) == (len(prompts), 6)
    assert [columns for _, columns in later] == [1] * (max(lengths) - 1)
    for step, (rows, _) in enumerate(later, start=1):
        going = sum(length > step for length in lengths)
        assert going <= rows and 4 * (rows - going) < rows
    assert later[-1][0] < len(prompts) / 4


def test_a_prompt_that_is_asked_several_times_is_read_once(llama: tuple[SharedBase, Any]) -> None:
    base, _ = llama
    prompts = [[5, 6, 7], [11, 12, 13, 14], [5, 6, 7], [11, 12, 13, 14], [5, 6, 7]]
    assert forwards(base, prompts, greedy())[:2] == [(2, 3), (5, 1)]
    assert forwards(base, prompts[:2], greedy())[0] == (2, 4), "different prompts: at once"
    assert forwards(base, [[5], [6, 7], [5]], greedy())[0] == (3, 2), "nothing to read before the last token"


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [6, 7]]},
        {"suppress_tokens": [5, 6, 7]},
        {"sequence_bias": [[[9], 4.0]]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_look_at_the_sequence(setting: dict[str, Any], llama: tuple[SharedBase, Any]) -> None:
    base, model = llama
    config = greedy(**setting)
    assert can_continue(base.causal_lm, config)
    wanted = by_one_generate(model, PROMPTS, config)
    assert completed(base, PROMPTS, config) == wanted
    assert wanted != by_plain_forwards(model, PROMPTS), "the setting matters"


@pytest.mark.parametrize(
    "setting",
    [
        {"min_new_tokens": 6},
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"begin_suppress_tokens": [5, 6, 7, 8, 20]},
        {"forced_eos_token_id": EOS},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_other_settings_are_plain_generate(setting: dict[str, Any], llama: tuple[SharedBase, Any]) -> None:
    base, model = llama
    config = greedy(**setting)
    assert not can_continue(base.causal_lm, config)
    assert completed(base, PROMPTS, config) == by_one_generate(model, PROMPTS, config)


def test_several_completions_of_a_prompt_are_asked_for_otherwise(llama: tuple[SharedBase, Any]) -> None:
    several = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=PAD, num_return_sequences=2)
    with pytest.raises(GenerationError, match=r"^num_return_sequences is 2, but each prompt gets one completion"):
        completed(llama[0], PROMPTS, several)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
        RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_remember_more_than_keys_and_values_are_plain_generate(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    assert not can_continue(model, greedy())
    asked: list[dict[str, Any]] = []

    class Base:
        causal_lm, device, pads_left, sharded = model, DEVICE, True, False

        def generate(self, role: str, **how: Any) -> Tensor:
            asked.append(how)
            return model.generate(**how)

    prompts = [[5, 6, 7]] * 3
    answers = TransformersGenerator(Base(), 8).answers(prompts, greedy(), "policy")
    assert [cut_at_eos(ids, ENDS) for ids in answers.ids] == by_one_generate(model, prompts, greedy())
    assert len(asked) == 1 and "past_key_values" not in asked[0]


def test_a_model_with_a_generate_of_its_own_is_left_to_it(llama: tuple[SharedBase, Any]) -> None:
    model = llama[1]
    assert can_continue(model, greedy())

    class Own(type(model)):  # type: ignore[misc]
        def generate(self, **kwargs: Any) -> Any: ...

    class OwnInputs(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...

    for kind in (Own, OwnInputs):
        assert not can_continue(kind(model.config), greedy())


def test_processes_that_share_weights_call_generate_equally_often(
    llama: tuple[SharedBase, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_generate, "is_deepspeed_zero3_enabled", lambda: True)
    assert not can_continue(llama[1], greedy())


@pytest.mark.parametrize(
    "own", [{"num_beams": 4}, {"num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_checkpoints_own_way_to_generate_is_no_fault_of_the_model(own: dict[str, Any]) -> None:
    """`generate` takes from it what is not asked for; the trial asks for plain samples."""
    model = AutoModelForCausalLM.from_config(config_of("llama"))
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    base = SharedBase.from_model(model)
    base.check_generates()
    assert base.pads_left and getattr(base.causal_lm.generation_config, next(iter(own))) == next(iter(own.values()))
