"""Rows as the hub lays them out, and rows that no model can read: a right result, or a sentence with row and column."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, FalconConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from tests.helpers import CHAT_TEMPLATE, QUIET, rollout, word_tokenizer
from trl_ext import PPOConfig, feedback
from trl_ext.evaluation.sampling import _check_read
from trl_ext.feedback import FeedbackError, Label, Pair, Ranking, Rating
from trl_ext.ppo.checks import check_run
from trl_ext.reward_models.rows import check_written
from trl_ext.reward_models.trainer import Scale, checked
from trl_ext.rewards import RewardError, Scorer
from trl_ext.tokens import PromptError, context_limit, fault_of_prompt, fault_of_template, tokenize_prompts

Q = {"role": "user", "content": "Why?"}
S = {"role": "system", "content": "Be brief."}
A, B = ({"role": "assistant", "content": text} for text in ("So.", "No."))

# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", "chosen": [Q, A], "rejected": [Q, B]}, [Q]),
        ({"prompt": "Why?", "chosen": [A], "rejected": [B]}, [Q]),
        ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, [Q]),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, [Q]),
        ({"chosen": [Q, A], "rejected": [Q, B]}, [Q]),
        ({"prompt": None, "chosen": [Q, A], "rejected": [Q, B]}, [Q]),
        ({"prompt": "Why?", "chosen": [S, Q, A], "rejected": [S, Q, B]}, [S, Q]),
        ({"prompt": [S, Q], "chosen": [S, Q, A], "rejected": [S, Q, B]}, [S, Q]),
        ({"prompt": "Why?", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 9.0}, [Q]),
        ({"prompt": [Q | {"name": None}], "chosen": [Q, A], "rejected": [Q, B]}, [Q | {"name": None}]),
    ],
)
def test_pairs_of_conversations(row: dict[str, Any], prompt: list[Any]) -> None:
    """One pair, however it is laid out, in the reader of the recipes and in the trainer's own check."""
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    assert feedback.read(rows).records == [Pair(prompt, [A], [B], None)]
    (ready,) = checked(rows, "train_dataset", "pairwise")
    assert (ready["prompt"], ready["chosen"], ready["rejected"]) == (prompt, [A], [B])


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "Why?", "completion": [A], "rating": 3}, Rating([Q], [A], (3.0,))),
        ({"prompt": [Q], "completion": [Q, A], "rating": 3}, Rating([Q], [A], (3.0,))),
        ({"prompt": "Why?", "completion": [Q, A], "label": 1}, Label([Q], [A], True)),
        ({"prompt": "Why?", "completions": [[Q, A], [Q, B]], "ranks": [1, 2]}, Ranking([Q], ([A], [B]), (1, 2))),
        ({"prompt": "Why?", "completions": [[A], [B]], "ranks": [2, 1]}, Ranking([Q], ([A], [B]), (2, 1))),
    ],
)
def test_other_feedback_on_conversations(row: dict[str, Any], record: Any) -> None:
    assert feedback.read(Dataset.from_list([row], on_mixed_types="use_json")).records == [record]


@pytest.mark.parametrize(
    ("row", "column", "reason"),
    [
        ({"chosen": "a", "rejected": ""}, "rejected", "empty"),
        ({"prompt": "Why?", "chosen": [Q, A], "rejected": []}, "rejected", "empty"),
        ({"prompt": "Why?", "chosen": [Q, A], "rejected": None}, "rejected", "missing"),
        ({"prompt": [Q], "chosen": [Q, A], "rejected": [B]}, "rejected", "does not go on from the prompt"),
        ({"prompt": [Q], "chosen": [Q], "rejected": [Q, B]}, "chosen", "does not go on from the prompt"),
        ({"prompt": [Q], "chosen": "a", "rejected": "b"}, "prompt", "messages, where others are texts"),
        ({"prompt": [{"role": "user", "content": 7}], "chosen": [A], "rejected": [B]}, "prompt", "which is no text"),
        ({"prompt": [Q | {"content": [{"type": "image"}]}], "chosen": [A], "rejected": [B]}, "prompt", "is no text"),
        ({"prompt": "Who?", "chosen": [Q, A], "rejected": [Q, B]}, "prompt", "do not begin with"),
    ],
)
def test_pairs_that_cannot_be_used(row: dict[str, Any], column: str, reason: str) -> None:
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    with pytest.raises(FeedbackError, match=rf"^dataset: line 1, column '{column}': .*{reason}"):
        feedback.read(rows)
    with pytest.raises(ValueError, match=rf"^Row 0 of train_dataset, column '{column}': .*{reason}"):
        checked(rows, "train_dataset", "pairwise")


# What the reward trainer takes --------------------------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("objective", "good", "bad", "column"),
    [
        *(("regression", {"rating": 1.0}, {"rating": r}, "rating") for r in (NAN, INF, -INF, None)),
        ("regression", {"rating": "1"}, {"rating": "lots"}, "rating"),
        *(("binary", {"label": 1}, {"label": label}, "label") for label in (2, -3, None)),
        *(("binary", {"label": 1, "weight": 1.0}, {"label": 0, "weight": w}, "weight") for w in (NAN, INF, -1.0)),
        ("ranking", {"completions": ["a", "b"], "ranks": [1, 2]}, {"completions": [], "ranks": []}, "completions"),
        ("ranking", {"completions": ["a", "b"], "ranks": [1, 2]}, {"completions": ["a", "b"], "ranks": [1]}, "ranks"),
        (
            "all_pairs",
            {"completions": ["a", "b"], "ranks": [1, 2]},
            {"completions": None, "ranks": None},
            "completions",
        ),
        *(
            (
                "pairwise",
                {"chosen": "a", "rejected": "b", "margin": 1.0},
                {"chosen": "a", "rejected": "b", "margin": m},
                "margin",
            )
            for m in (NAN, INF, 1e39)
        ),
        ("probe", {"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None}, "rejected"),
    ],
)
def test_numbers_that_are_none(objective: str, good: dict[str, Any], bad: dict[str, Any], column: str) -> None:
    more = {"prompt": "p"} | ({} if objective in ("ranking", "all_pairs", "pairwise", "probe") else {"completion": "c"})
    rows = Dataset.from_list([more | good, more | good, more | bad], on_mixed_types="use_json")
    with pytest.raises(ValueError, match=rf"^Row 2 of train_dataset, column '{column}': .*\.$") as raised:
        checked(rows, "train_dataset", objective)
    assert "\n" not in str(raised.value)


def test_ratings_in_texts_are_numbers_and_margins_may_be_missing() -> None:
    rows = Dataset.from_list([{"prompt": "p", "completion": c, "rating": r} for c, r in (("a", "1"), ("b", "4.5"))])
    assert checked(rows, "train_dataset", "regression")["rating"] == [1.0, 4.5]
    rows = Dataset.from_list([{"chosen": "a", "rejected": "b", "margin": m} for m in (0.5, None)])
    assert checked(rows, "train_dataset", "pairwise")["margin"] == [0.5, 0.0]
    words = Dataset.from_list([{"completion": c, "label": label} for c, label in (("a", "good"), ("b", "bad"))])
    assert checked(words, "train_dataset", "binary")["label"] == [True, False]


def test_only_some_rankings_have_a_prompt() -> None:
    rows = [{"completions": [[A], [B]], "ranks": [1, 2]}, {"completions": [[Q, A], [Q, B]], "ranks": [1, 2]}]
    ready = checked(Dataset.from_list(rows, on_mixed_types="use_json"), "train_dataset", "ranking")
    assert [(row["prompt"], row["completions"]) for row in ready] == [("", [[A], [B]]), ([Q], [[A], [B]])]


def test_good_rows_are_left_as_they_are_and_rows_in_ids_are_not_looked_at() -> None:
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert checked(rows, "train_dataset", "pairwise") is rows
    ids = Dataset.from_list([{"chosen_ids": [1], "rejected_ids": [2]}])
    assert checked(ids, "train_dataset", "pairwise") is ids


def test_a_stream_of_pairs_is_checked_when_it_is_drawn() -> None:
    rows = Dataset.from_list(
        [{"prompt": "Why?", "chosen": [A], "rejected": [B]}, {"prompt": "Why?", "chosen": [A], "rejected": []}]
    )
    stream = iter(checked(rows.to_iterable_dataset(), "train_dataset", "pairwise"))
    assert next(stream)["prompt"] == [Q]
    with pytest.raises(ValueError, match=r"^Row 1 of train_dataset, column 'rejected': empty"):
        next(stream)
    rated = Dataset.from_list([{"completion": "a", "rating": 1}]).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"^train_dataset must be a datasets\.Dataset"):
        checked(rated, "train_dataset", "regression")


def test_ratings_too_far_apart_to_compute_with() -> None:
    rows = Dataset.from_list([{"completion": "a", "rating": 1e308}, {"completion": "b", "rating": -1e308}])
    with pytest.raises(ValueError, match=r"^The ratings go from -1e\+308 to 1e\+308: rescale them\.$"):
        Scale.of(rows, "regression")


def test_a_row_that_the_template_refuses_is_named() -> None:
    tokenizer = word_tokenizer("{{ raise_exception('Roles must alternate') if messages|length > 2 }}" + CHAT_TEMPLATE)
    rows = Dataset.from_list(
        [{"prompt": [Q], "chosen": [A], "rejected": [B]}] * 2 + [{"prompt": [Q], "chosen": [A, B], "rejected": [B]}]
    )
    with pytest.raises(
        ValueError, match=r"^Row 2 of D, column 'chosen': cannot be written in ids .*Roles must alternate"
    ):
        check_written(rows, "D", tokenizer)


@pytest.mark.parametrize(
    ("max_length", "cut", "refused"), [(None, False, True), (8, False, False), (8, True, False), (16, True, True)]
)
def test_answers_beyond_what_the_model_reads(max_length: int | None, cut: bool, refused: bool) -> None:
    """12 words and an EOS; the model reads 10."""
    rows = Dataset.from_list([{"prompt": "the", "chosen": " cat" * 11, "rejected": " dog"}])
    config = GPT2Config(vocab_size=25, n_positions=10)
    if not refused:
        check_written(rows, "D", word_tokenizer(), config, max_length, cut)
        return
    with pytest.raises(
        ValueError, match=r"^Row 0 of D, column 'chosen': has 13 tokens with its prompt, but the model reads 10"
    ):
        check_written(rows, "D", word_tokenizer(), config, max_length, cut)


# What a model can read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=64), 64),
        (
            LlamaConfig(
                max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
            ),
            256,
        ),
        (
            LlamaConfig(
                max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            64,  # beyond, each row would be read otherwise beside a longer one
        ),
        (
            Qwen2Config(
                max_position_embeddings=32,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 1e4,
                },
            ),
            128,
        ),
        (MistralConfig(max_position_embeddings=64, sliding_window=16), None),
        (MistralConfig(max_position_embeddings=64, sliding_window=None), 64),
        (FalconConfig(alibi=True), None),
        (AutoConfig.for_model("bloom"), None),
        (AutoConfig.for_model("mamba"), None),
        (AutoConfig.for_model("gemma3_text", max_position_embeddings=64), 64),
    ],
)
def test_how_far_a_model_reads(config: Any, limit: int | None) -> None:
    assert context_limit(config) == limit


class Model:
    def __init__(self, **changes: Any) -> None:
        self.config = GPT2Config(**{"vocab_size": 25, "n_positions": 16, **changes})


def judge(**_: Any) -> list[float]:
    return []


def run(prompts: list[Any], functions: Any = (judge,), tokenizer: Any = None, model: Any = None, **changes: Any) -> Any:
    args = PPOConfig("run", per_device_train_batch_size=1, **{**QUIET, "max_completion_length": 4, **changes})
    data = Dataset.from_dict({"prompt": prompts})
    return check_run(args, data, None, tokenizer or word_tokenizer(CHAT_TEMPLATE), list(functions), model or Model())


def test_a_prompt_that_leaves_no_room_for_its_completion() -> None:
    run(["the cat", "the " * 12])
    with pytest.raises(ValueError) as raised:
        run(["the cat", "the " * 13])
    assert str(raised.value) == (
        "The prompt in row 1 of train_dataset has 13 tokens and 4 may follow, but the model reads 16: shorten or drop "
        "the row, or lower max_completion_length."
    )
    with pytest.raises(ValueError, match="has 12 tokens and 5 may follow"):
        run(["the " * 12], generation_kwargs={"max_new_tokens": 5})
    run(["the " * 100], model=Model(n_positions=128))


def test_what_a_reward_role_reads_after_a_completion_counts() -> None:
    """The template writes a newline after the EOS. The prompt is <start> user, newline, 4 words, EOS, newline, then
    <start> assistant and a newline: 12 ids in all, with the word of the user."""
    chat = [[{"role": "user", "content": "the cat sat on"}]]
    ids = tokenize_prompts(chat, word_tokenizer(CHAT_TEMPLATE))[0]
    assert len(ids) == 12
    run(chat)
    with pytest.raises(ValueError, match="has 12 tokens and 5 may follow"):
        run(chat, functions=[])


def test_a_pad_token_that_the_model_does_not_have() -> None:
    tokenizer = word_tokenizer(pad=False)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 25
    assert run(["the cat"], tokenizer=tokenizer).pad_token_id == 1  # the EOS: masks say what is padding
    with pytest.raises(
        ValueError, match=r"row 1 of train_dataset holds the token '\[PAD\]' \(id 25\), but the model has 25"
    ):
        run(["the cat", "the [PAD]"], tokenizer=tokenizer)
    tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    with pytest.raises(
        ValueError, match=r"^The tokenizer's EOS token '\[EOS\]' has the id 26, but the model has 25 ids"
    ):
        run(["the cat"], tokenizer=tokenizer)


def test_prompts_of_two_kinds_unknown_roles_and_parts() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}"
    dropping = word_tokenizer(template)
    assert fault_of_template([Q, Q | {"role": "tool"}], dropping) is None, "a known role is the template's affair"
    with pytest.raises(
        ValueError, match=r"^The prompt in row 1 of train_dataset has a message of the role 'human' that"
    ):
        run([[Q], [Q, {"role": "human", "content": "the cat"}]], tokenizer=dropping)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    with pytest.raises(
        ValueError, match=r"row 0 of train_dataset has a message in parts, which the chat template writes"
    ):
        run([parts], tokenizer=dropping)
    only_texts = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}a"
    texts_alone = word_tokenizer(only_texts)
    with pytest.raises(ValueError, match=r"has a message in parts, which the chat template does not write: give it as"):
        run([parts], tokenizer=texts_alone)
    reading = word_tokenizer("{% for m in messages %}{% for p in m.content %}{{ p.text }} {% endfor %}{% endfor %}")
    run([parts], tokenizer=reading)


def test_what_is_asked_must_be_in_what_the_template_writes() -> None:
    """In whatever way: a template may write it as JSON, in capitals, or with an opening for the answer alone."""
    skips = word_tokenizer("{% for m in messages[1:] %}{{ m.role }} {{ m.content }} {% endfor %}the")
    with pytest.raises(
        ValueError, match=r"^The prompt in row 1 of train_dataset has a last message that the chat temp"
    ):
        run([[Q, Q], [Q]], tokenizer=skips)
    assert fault_of_prompt([Q | {"content": "the"}], skips) is not None, (
        "though that word is written, of something else"
    )
    for content in ("cat", '{"temp": 22}', "0", "the cat sat on the mat and the dog"):
        for written in ("m.content | tojson", "m.content | upper", "m.content | e"):
            loop = "{% for m in messages %}{{ " + written + " }} {% endfor %}"
            for template in (loop, "{% if add_generation_prompt %}" + loop + "{% endif %}the"):
                for role in ("user", "tool"):
                    assert fault_of_prompt([{"role": role, "content": content}], word_tokenizer(template)) is None
    for content in ("", None):  # an empty one has its own finding
        assert fault_of_prompt([{"role": "user", "content": content}], skips) is None


def test_a_conversation_that_is_answered_already_is_no_prompt() -> None:
    """The column of whole conversations, in the place of that of the prompts."""
    answered = [Q, {"role": "assistant", "content": "the cat"}]
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"^The prompt in row 1 of train_dataset has an answer at its end already: "):
        run([[Q], answered], tokenizer=tokenizer)
    with pytest.raises(PromptError, match=r"^Prompt .* has an answer at its end already: ") as raised:
        _check_read([{"prompt": [Q]}, {"prompt": answered}], tokenizer, None, 4)
    assert raised.value.row == 1
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert fault_of_prompt(answered, tokenizer, **goes_on) is None
    assert fault_of_prompt([*answered, Q], tokenizer) is None, "a dialogue"


def test_a_prompt_that_the_template_refuses_is_named_wherever_it_is_written() -> None:
    strict = word_tokenizer("{{ raise_exception('No system role') if messages[0].role == 'system' }}" + CHAT_TEMPLATE)
    with pytest.raises(
        PromptError, match=r"^Prompt .* cannot be written in ids \(TemplateError: No system role\)"
    ) as raised:
        tokenize_prompts([[Q], [S, Q]], strict)
    assert raised.value.row == 1
    with pytest.raises(ValueError, match=r"^The prompt in row 1 of train_dataset cannot be written in ids"):
        run([[Q], [S, Q]], tokenizer=strict, model=Model(n_positions=64))


# Reward functions ----------------------------------------------------------------------------------------------------

ROLLOUT = rollout([3, 1, 2], [False, True, True])
NUMBERS = [1.0, -2.5, 3.0]


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    "held",
    [
        np.array,
        lambda x: np.array(x)[:, None],
        lambda x: np.array(x, dtype=object),
        lambda x: pd.Series(x, index=[7, 8, 9]),
        torch.tensor,
        lambda x: torch.tensor(x)[:, None],
        lambda x: torch.tensor(x, requires_grad=True),
        tuple,
        iter,
        lambda x: (number for number in x),
        dict.fromkeys,
    ],
)
def test_whatever_holds_numbers_in_their_order(held: Any, timeout: float | None) -> None:
    values = held(NUMBERS)
    scorer = Scorer([named(values.keys() if isinstance(values, dict) else values)], timeout=timeout)
    if isinstance(values, dict):  # keys are a set to Python, whose order is nobody's
        with pytest.raises(RewardError, match="returned dict_keys: return a list"):
            scorer(ROLLOUT, {})
        return
    assert scorer(ROLLOUT, {})[:, 0].tolist() == NUMBERS


def test_an_async_function_and_a_generator_that_fails() -> None:
    async def late(**_: Any) -> Any:
        return np.array(NUMBERS)

    assert Scorer([late])(ROLLOUT, {})[:, 0].tolist() == NUMBERS

    def breaks(**_: Any) -> Any:
        yield 1.0
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"^Reward function 'breaks' raised KeyError: 'answer'\."):
        Scorer([breaks])(ROLLOUT, {})


@pytest.mark.parametrize("values", [np.float64(1.0), torch.tensor(1.0), {1.0, 2.0, 3.0}, np.ones((3, 2)), b"abc"])
def test_what_holds_none(values: Any) -> None:
    with pytest.raises(RewardError, match=r"^Reward function 'judge' returned"):
        Scorer([named(values)])(ROLLOUT, {})


def named(values: Any) -> Any:
    def judge(**_: Any) -> Any:
        return values

    return judge


def test_a_function_gets_what_its_signature_takes() -> None:
    seen: dict[str, Any] = {}

    def plain(completions: list[str], city: list[str], completion_ids: Any = None) -> list[float]:
        seen.update(completions=completions, city=city, completion_ids=completion_ids)
        return NUMBERS

    columns = {"city": ["x", "y", "z"], "other": [1, 2, 3]}
    assert Scorer([plain])(ROLLOUT, columns, trainer_state=None)[:, 0].tolist() == NUMBERS
    assert seen == {
        "completions": ["completion 0", "completion 1", "completion 2"],
        "city": ["x", "y", "z"],
        "completion_ids": [[500, 501, 502], [1], [506, 1]],
    }


def test_a_function_that_asks_for_what_nobody_has() -> None:
    def asks(completions: list[str], country: list[str]) -> list[float]:
        return NUMBERS

    with pytest.raises(
        ValueError, match=r"^train_dataset: Reward function 'asks' asks for 'country', and is called by"
    ):
        run(["the cat"], functions=[asks])
    with pytest.raises(RewardError, match="asks for 'country'"):
        Scorer([asks])(ROLLOUT, {})


# generation_kwargs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"top_kk": 3}, "generation_kwargs names 'top_kk', which GenerationConfig does not have: do you mean 'top_k'?"),
        (
            {"temperature": 0.5},
            "generation_kwargs has temperature 0.5, but log-probabilities are taken at temperature 1",
        ),
        ({"num_return_sequences": 2}, "generation_kwargs has num_return_sequences=2: one completion a prompt"),
        ({"return_dict_in_generate": True}, "generation_kwargs has return_dict_in_generate=True"),
        ({"stop_strings": ["."]}, "generation_kwargs has stop_strings="),
        ({"eos_token_id": "5"}, "generation_kwargs has eos_token_id='5': give an id, or a list of ids."),
        ({"eos_token_id": []}, "generation_kwargs has eos_token_id="),
        ({"max_new_tokens": -1}, "generation_kwargs has max_new_tokens=-1: give a whole number, at least 1."),
    ],
)
def test_generation_kwargs_that_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        PPOConfig("run", generation_kwargs=given, **QUIET)
    assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)


def test_generation_kwargs_that_are_fine() -> None:
    for given in ({"eos_token_id": 5}, {"eos_token_id": [5, 6]}, {"temperature": 0.7}, '{"top_p": 0.9}'):
        PPOConfig("run", generation_kwargs=given, temperature=0.7, **QUIET)
