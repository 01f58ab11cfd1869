"""From prompts to a rollout: tokenising, cutting at the EOS, and the layout of what comes back."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GenerationConfig

from tests.helpers import CHAT_TEMPLATE, tiny_llama, word_tokenizer
from trl_ext import SharedBase
from trl_ext.generation import GenerationError, TransformersGenerator, begin, generate
from trl_ext.tokens import check_chat_template, cut_at_eos, eos_ids, tokenize_prompts
from trl_ext.types import Rollout

# Ids of `word_tokenizer`.
PAD, EOS, START, NEWLINE, USER, ASSISTANT = 0, 1, 3, 4, 5, 6
THE, A, CAT, DOG, BIRD, SAT = 7, 8, 9, 10, 11, 12


def says(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


# Prompts to ids ------------------------------------------------------------------------------------------------------


def test_texts() -> None:
    assert tokenize_prompts(["the cat sat", "a dog"], word_tokenizer()) == [[THE, CAT, SAT], [A, DOG]]


def test_texts_are_not_templated_where_there_is_a_template() -> None:
    assert tokenize_prompts(["the cat"], word_tokenizer(CHAT_TEMPLATE)) == [[THE, CAT]]


def test_conversations_end_with_the_generation_prompt() -> None:
    conversations = [[says("the cat")], [says("a dog"), says("sat", "assistant"), says("bird")]]
    ask = [START, ASSISTANT, NEWLINE]
    assert tokenize_prompts(conversations, word_tokenizer(CHAT_TEMPLATE)) == [
        [START, USER, NEWLINE, THE, CAT, EOS, NEWLINE, *ask],
        [
            START,
            USER,
            NEWLINE,
            A,
            DOG,
            EOS,
            NEWLINE,
            *ask,
            SAT,
            EOS,
            NEWLINE,
            START,
            USER,
            NEWLINE,
            BIRD,
            EOS,
            NEWLINE,
            *ask,
        ],
    ]


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = word_tokenizer("{{ messages[0]['content'] }}{% if loud %} bird{% endif %}")
    assert tokenize_prompts([[says("cat")]], tokenizer) == [[CAT]]
    assert tokenize_prompts([[says("cat")]], tokenizer, {"loud": True}) == [[CAT, BIRD]]


def test_conversations_without_a_template() -> None:
    message = "The prompts are conversations, but the tokenizer has no chat template"
    for refused in (
        lambda: tokenize_prompts([[says("cat")]], word_tokenizer()),
        lambda: check_chat_template(word_tokenizer()),
    ):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
    check_chat_template(word_tokenizer(CHAT_TEMPLATE))


def test_a_prompt_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Prompt '  ' has no tokens"):
        tokenize_prompts(["cat", "  ", "dog"], word_tokenizer())


# Where an answer ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "eos", "cut", "lengths", "ended"),
    [
        # EOS first; in the middle with garbage after it; last; twice; never
        (
            [[1, 7, 7, 7], [7, 8, 1, 9], [7, 8, 9, 1], [7, 1, 8, 1], [7, 8, 9, 5]],
            [1],
            [[1, 0, 0, 0], [7, 8, 1, 0], [7, 8, 9, 1], [7, 1, 0, 0], [7, 8, 9, 5]],
            [1, 3, 4, 2, 4],
            [True, True, True, True, False],
        ),
        # columns that no row reaches are dropped
        ([[7, 1, 0, 0, 0], [1, 0, 0, 0, 0]], [1], [[7, 1], [1, 0]], [2, 1], [True, True]),
        # several EOS ids: the first of any ends the answer
        ([[7, 2, 1, 9], [7, 8, 1, 2]], [1, 2], [[7, 2, 0], [7, 8, 1]], [2, 3], [True, True]),
        # a pad id that was sampled before the end is a token like any other
        ([[7, 0, 8, 1]], [1], [[7, 0, 8, 1]], [4], [True]),
    ],
    ids=["positions", "narrow", "several", "sampled-pad"],
)
def test_cut_at_eos(
    ids: list[list[int]], eos: list[int], cut: list[list[int]], lengths: list[int], ended: list[bool]
) -> None:
    rollout = rollout_of(ids, eos, pad=0)
    assert rollout.completion_ids.tolist() == cut
    assert rollout.completion_mask.tolist() == [[i < length for i in range(max(lengths))] for length in lengths]
    assert rollout.has_eos.tolist() == ended


def test_cut_where_padding_is_the_eos() -> None:
    """The first EOS is a token that was said, those that fill up are not."""
    rollout = rollout_of([[7, 1, 1, 1], [7, 8, 9, 7], [1, 1, 1, 1]], [1], pad=1)
    assert rollout.completion_ids.tolist() == [[7, 1, 1, 1], [7, 8, 9, 7], [1, 1, 1, 1]]
    assert rollout.lengths.tolist() == [2, 4, 1]
    assert rollout.has_eos.tolist() == [True, False, True]


def test_the_cut_is_after_the_first_eos() -> None:
    assert cut_at_eos([7, 2, 8, 1], [1, 2]) == [7, 2]
    assert cut_at_eos([7, 8], [1]) == [7, 8]
    assert cut_at_eos([], [1]) == []


# Who answers ---------------------------------------------------------------------------------------------------------


def test_log_probs_of_the_generator_stay_beside_their_ids() -> None:
    """Those after an EOS go with what they belong to; padding has none."""
    rollout = rollout_of([[7, 1, 8], [7, 8, 9]], [1], pad=0, logprobs=[[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert rollout.sampling_logprobs is not None
    assert rollout.sampling_logprobs.tolist() == [[-1.0, -2.0, 0.0], [-4.0, -5.0, -6.0]]
    assert rollout_of([[7, 1, 8]], [1], pad=0).sampling_logprobs is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[7]], r"returned 1 completions for 2 prompts: return one list of ids each"),
        (None, r"returned NoneType for 2 prompts"),
        ([[7], ["cat"]], r"returned something other than lists of ids and numbers"),
        ([[7], [8.5]], r"returned something other than lists of ids and numbers"),
        (["7", "8"], r"returned something other than lists of ids and numbers"),
        ([7, 8], r"returned something other than lists of ids and numbers"),
        (([[7], [8]], [[0.5], []]), r"returned log-probs of other lengths than its ids"),
        (([[7], [8]], [[-0.5], [float("nan")]]), r"returned log-probs that are not finite"),
        ([[7], [8, 30]], r"returned an id that the model does not have in row 1: 30"),
        ([[7, -1], [8]], r"returned an id that the model does not have in row 0: -1"),
        ([[7], [8, 8, 8, 8]], r"returned 4 ids in row 1: max_completion_length is 3"),
        (KeyError("cat"), r"raised KeyError: 'cat'"),
    ],
)
def test_a_generator_that_returns_something_else_is_named(answer: Any, message: str) -> None:
    class Careless:
        def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=3)
    with pytest.raises(GenerationError, match=rf"^Careless\.answers {message}") as error:
        generate(Careless(), ["cat", "dog"], word_tokenizer(), config, vocab_size=25)
    assert "\n" not in str(error.value)


def test_answers_that_were_begun_are_taken_as_others_are() -> None:
    """They are held to the same, and a failure in the background comes up where they are taken."""
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=3)
    given: list[Any] = []

    class Later:
        def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
            raise AssertionError("nobody asks")

        def begin(self, prompt_ids: Any, config: Any, role: str) -> Any:
            given.append((prompt_ids, role))
            return futures.pop(0)

    answered, failed, short = Future[Any](), Future[Any](), Future[Any]()
    answered.set_result(([[A, EOS, 99], [CAT, DOG]], [[-1.0, -2.0, -3.0], [-4.0, -5.0]]))
    failed.set_exception(KeyError("cat"))
    short.set_result([[7]])
    futures: list[Any] = [answered, failed, short, "soon"]
    prompts, tokenizer = ["cat", "dog"], word_tokenizer()
    rollout = generate(Later(), prompts, tokenizer, config, begun=begin(Later(), prompts, tokenizer, config))
    assert given == [([[CAT], [DOG]], "policy")]
    assert rollout.completion_tokens == [[A, EOS], [CAT, DOG]]
    assert rollout.sampling_logprobs is not None
    assert rollout.sampling_logprobs.tolist() == [[-1.0, -2.0], [-4.0, -5.0]]
    for says in ("raised KeyError: 'cat'", "returned 1 completions for 2 prompts", "returned str: return a concurrent"):
        with pytest.raises(GenerationError, match=rf"^Later\.begin {says}"):
            generate(Later(), prompts, tokenizer, config, begun=begin(Later(), prompts, tokenizer, config))
    with pytest.raises(GenerationError, match=r"^Later\.begin raised IndexError: pop from empty list\.$"):
        begin(Later(), prompts, tokenizer, config)


def test_what_a_generator_does_to_its_arguments_stays_with_it() -> None:
    """And what follows an EOS is dropped before anything else is asked of it."""

    class Rough:
        def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
            prompt_ids[0].clear()
            prompt_ids.clear()
            config.eos_token_id = [CAT]
            return [[A, EOS, 99, 99], [CAT, DOG]]

    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=3)
    rollout = generate(Rough(), ["cat", "dog"], word_tokenizer(), config, vocab_size=25)
    assert rollout.prompt_tokens == [[CAT], [DOG]] and rollout.completion_tokens == [[A, EOS], [CAT, DOG]]
    assert rollout.has_eos.tolist() == [True, False] and config.eos_token_id == EOS


def rollout_of(ids: list[list[int]], eos: list[int], pad: int, logprobs: Any = None) -> Rollout:
    """What becomes of these completions."""

    class Fixed:
        def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
            return ids if logprobs is None else (ids, logprobs)

    config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return generate(Fixed(), ["cat"] * len(ids), word_tokenizer(), config)


# Generating ----------------------------------------------------------------------------------------------------------


class ScriptedPolicy:
    """Answers each prompt from a table, as Transformers' generate returns it; remembers how it was called."""

    pads_left, sharded = True, False
    device, causal_lm = torch.device("cpu"), None  # the configs below leave each batch to one generate

    def __init__(self, answers: dict[tuple[int, ...], list[int]], fill: int = PAD) -> None:
        self.answers, self.fill = answers, fill
        self.calls: list[dict[str, Any]] = []

    def generate(self, **kwargs: Any) -> Tensor:
        self.calls.append(kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        given = [self.answers[tuple(row[keep.bool()].tolist())] for row, keep in zip(ids, mask, strict=True)]
        width = max(len(answer) for answer in given)
        return torch.cat(
            [ids, torch.tensor([[*answer, *[self.fill] * (width - len(answer))] for answer in given])], dim=1
        )


ANSWERS = {
    (THE, CAT, SAT): [A, DOG, EOS],
    (CAT,): [EOS],
    (A, DOG): [SAT, SAT, SAT, SAT],
    (DOG,): [THE, BIRD, EOS],
    (BIRD,): [A, EOS],
}
PROMPTS = ["the cat sat", "cat", "a dog", "dog", "bird"]
COMPLETIONS = ["a dog", "", "sat sat sat sat", "the bird", "a"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_rollout_of_texts(batch_size: int) -> None:
    """The same rollout however the prompts are batched."""
    policy = ScriptedPolicy(ANSWERS)
    config = GenerationConfig(eos_token_id=[EOS], pad_token_id=PAD)
    rollout = generate(TransformersGenerator(policy, batch_size), PROMPTS, word_tokenizer(), config)
    assert rollout.prompts == PROMPTS
    assert rollout.completions == COMPLETIONS
    assert rollout.prompt_ids.tolist() == [[THE, CAT, SAT], [0, 0, CAT], [0, A, DOG], [0, 0, DOG], [0, 0, BIRD]]
    assert torch.equal(rollout.prompt_mask, rollout.prompt_ids != 0)
    assert rollout.completion_ids.tolist() == [
        [A, DOG, EOS, 0],
        [EOS, 0, 0, 0],
        [SAT, SAT, SAT, SAT],
        [THE, BIRD, EOS, 0],
        [A, EOS, 0, 0],
    ]
    assert torch.equal(rollout.completion_mask, rollout.completion_ids != 0)
    assert rollout.has_eos.tolist() == [True, True, False, True, True]
    sizes = [len(call["input_ids"]) for call in policy.calls]
    assert sizes == [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
    assert all(call["generation_config"].to_dict() == config.to_dict() for call in policy.calls)


def test_rollout_where_padding_is_the_eos() -> None:
    policy = ScriptedPolicy(ANSWERS, fill=EOS)
    rollout = generate(
        TransformersGenerator(policy, 5),
        PROMPTS,
        word_tokenizer(),
        GenerationConfig(eos_token_id=[EOS], pad_token_id=EOS),
    )
    assert rollout.prompt_ids[1].tolist() == [EOS, EOS, CAT]
    assert rollout.prompt_mask[1].tolist() == [False, False, True]
    assert rollout.lengths.tolist() == [3, 1, 4, 3, 2]
    assert rollout.completions == COMPLETIONS


def test_rollout_of_conversations() -> None:
    ids = (START, USER, NEWLINE, THE, CAT, EOS, NEWLINE, START, ASSISTANT, NEWLINE)
    policy = ScriptedPolicy({ids: [A, DOG, EOS]})
    prompts = [[says("the cat")], [says("the cat")]]
    config = GenerationConfig(eos_token_id=[EOS], pad_token_id=PAD)
    rollout = generate(TransformersGenerator(policy, 2), prompts, word_tokenizer(CHAT_TEMPLATE), config)
    assert rollout.prompts == prompts
    assert rollout.completions == [[says("a dog", "assistant")]] * 2


def test_a_models_answers_do_not_depend_on_the_batch() -> None:
    """Greedy answers of a batch with ragged prompts are those of a loop of plain forwards, prompt by prompt."""
    model, tokenizer, count = tiny_llama(seed=5), word_tokenizer(), 6
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        answer: list[int] = []
        while len(answer) < count and EOS not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        expected.append(answer)
    assert len({tuple(answer) for answer in expected}) > 2  # else mixed-up rows would not show
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=[EOS], pad_token_id=PAD)
    base = SharedBase.from_model(model)  # a new policy says what the model says
    rollout = generate(TransformersGenerator(base, 3), PROMPTS, tokenizer, config)
    answers = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
    assert answers == expected


# What ends an answer, and what does not get in ------------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "ids"), [(None, [1]), (1, [1]), ([5, 1], [5, 1]), ([5, 6], [1, 5, 6])])
def test_every_eos_that_model_or_tokenizer_names(declared: Any, ids: list[int]) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = declared
    tokenizer = word_tokenizer()
    assert eos_ids(model, tokenizer) == ids
    tokenizer.eos_token = None
    assert None not in eos_ids(model, tokenizer)


def test_answers_know_neither_dropout_nor_the_model_s_own_defaults() -> None:
    lora = LoraConfig(r=4, lora_dropout=0.9, target_modules="all-linear")
    base = SharedBase.from_model(tiny_llama(), policy=lora)
    for parameter in base.trainable_parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.tensor([[THE, CAT]])
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=[EOS])
    how: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
    plain = base.eval().generate(**how)
    own = base.causal_lm.generation_config
    own.suppress_tokens = [int(plain[0, ids.shape[1]])]
    assert torch.equal(base.train().generate(**how), plain)
    assert base.causal_lm.generation_config is own and base.training
