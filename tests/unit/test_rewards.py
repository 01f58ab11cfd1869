"""Reward functions as TRL calls them: what they receive, what they may return, and what becomes of it."""

import ast
import asyncio
import math
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.helpers import CHAT_TEMPLATE, rollout, saved_model, tiny_classifier, tiny_llama, word_tokenizer
from trl_ext import rewards
from trl_ext.interop import RewardModule
from trl_ext.rewards import Combination, RewardError, Scorer, name_of, weighted_total
from trl_ext.rewards.sentiment import _analyzer, vader_sentiment
from trl_ext.types import Rollout

NAN, INF = float("nan"), float("inf")
ROLLOUT = rollout([3, 1, 2], [False, True, True])


def constant(*values: Any) -> Callable[..., list[Any]]:
    def returns(**_: Any) -> list[Any]:
        return list(values)

    return returns


def texts(prompts: list[Any], completions: list[Any]) -> Rollout:
    """A rollout where only the texts matter."""
    return Rollout(
        prompts, completions, *[torch.ones(len(prompts), 1).bool() for _ in range(4)], torch.ones(len(prompts)).bool()
    )


# Calling -------------------------------------------------------------------------------------------------------------


def test_what_a_function_receives() -> None:
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0, 0.0]

    state, log_extra, log_metric = object(), object(), object()
    columns = {"answer": ["x", "y", "z"], "completions": ["a dataset column cannot hide the answers"] * 3}
    Scorer([reward])(ROLLOUT, columns, trainer_state=state, log_extra=log_extra, log_metric=log_metric)
    assert seen == {
        "prompts": ["prompt 0", "prompt 1", "prompt 2"],
        "completions": ["completion 0", "completion 1", "completion 2"],
        "completion_ids": [[500, 501, 502], [1], [506, 1]],  # plain lists, EOS included, no padding
        "answer": ["x", "y", "z"],
        "trainer_state": state,
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def test_weighted_sum_of_several_functions() -> None:
    by_function = Scorer([constant(1.0, 2.0, 3.0), constant(10.0, -10.0, 0.5)])(ROLLOUT, {})
    assert by_function.tolist() == [[1.0, 10.0], [2.0, -10.0], [3.0, 0.5]]
    assert Combination([2.0, -0.5])(by_function).tolist() == [2.0 - 5.0, 4.0 + 5.0, 6.0 - 0.25]


def test_none_abstains_as_in_trl() -> None:
    """Functions that said None are left out of the sum, weights unchanged; a row of Nones has no score."""
    by_function = Scorer([constant(1.0, None, None), constant(4.0, 3.0, None)])(ROLLOUT, {})
    assert by_function.isnan().tolist() == [[False, False], [True, False], [True, True]]
    total = Combination([1.0, 0.5])(by_function)
    assert total[:2].tolist() == [3.0, 1.5]
    assert math.isnan(total[2])


def test_weighted_total_alone() -> None:
    total = weighted_total(torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 3.0]]), torch.tensor([0.0, 10.0]))
    assert total[0].isnan(), "what has weight 0 is watched, and scores nothing"
    assert math.isnan(total[1])
    assert total[2].item() == 30.0


@pytest.mark.parametrize("values", [(1, 0, 1), (True, False, True), (torch.tensor(1.0), torch.tensor(0), 1.0)])
def test_numbers_of_any_kind(values: tuple[Any, ...]) -> None:
    total = Scorer([constant(*values)])(ROLLOUT, {})[:, 0]
    assert total.tolist() == [1.0, 0.0, 1.0]
    assert total.dtype == torch.float32


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), torch.tensor([1.0, 2.0, 3.0])], ids=["tuple", "tensor"])
def test_sequences_beside_lists(values: Any) -> None:
    assert Scorer([lambda **_: values])(ROLLOUT, {})[:, 0].tolist() == [1.0, 2.0, 3.0]


# Async ---------------------------------------------------------------------------------------------------------------


def test_async_and_sync_mixed_keep_their_columns() -> None:
    async def late(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.02)
        return [100.0] * len(completions)

    async def early(completions: list[str], **_: Any) -> list[float | None]:
        return [200.0, None, 200.0]

    scorer = Scorer([late, constant(1.0, 2.0, 3.0), early])
    by_function = scorer(ROLLOUT, {})
    assert by_function.nan_to_num(-1.0).tolist() == [[100.0, 1.0, 200.0], [100.0, 2.0, -1.0], [100.0, 3.0, 200.0]]
    assert scorer.names == ["late", "returns", "early"]


def test_async_functions_wait_together() -> None:
    """Two that wait for each other: called one after the other they would never return."""
    arrived: list[asyncio.Event] = []

    async def meet(**_: Any) -> list[float]:
        arrived.append(asyncio.Event())
        while len(arrived) < 2:
            await asyncio.sleep(0.001)
        return [1.0, 1.0, 1.0]

    async def bounded(**kwargs: Any) -> list[float]:
        return await asyncio.wait_for(meet(**kwargs), timeout=5)

    assert Scorer([bounded, bounded])(ROLLOUT, {}).tolist() == [[1.0, 1.0]] * 3


def test_one_event_loop_for_the_whole_run() -> None:
    loops = []

    async def reward(**_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0, 0.0]

    scorer = Scorer([reward])
    scorer(ROLLOUT, {})
    scorer(ROLLOUT, {})
    assert loops[0] is loops[1]
    assert loops[0].is_running()


def test_works_inside_a_running_event_loop() -> None:
    """As in a notebook."""

    async def reward(**_: Any) -> list[float]:
        return [1.0, 2.0, 3.0]

    async def notebook() -> list[float]:
        return Scorer([reward])(ROLLOUT, {})[:, 0].tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


def test_an_error_of_an_async_function_surfaces() -> None:
    async def reward(**_: Any) -> list[float]:
        raise ConnectionError("no answer")

    with pytest.raises(RewardError, match=r"^Reward function 'reward' raised ConnectionError: no answer\.") as raised:
        Scorer([reward])(ROLLOUT, {})
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_an_async_function_that_is_cancelled_is_named() -> None:
    """Its error is none that `except Exception` sees."""

    async def reward(**_: Any) -> list[float]:
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match=r"^Reward function 'reward' raised RuntimeError: it was cancelled\."):
        Scorer([reward])(ROLLOUT, {})


def test_an_error_of_a_sync_function_is_named() -> None:
    def judge(**_: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"^Reward function 'judge' raised KeyError: 'answer'\.") as raised:
        Scorer([judge])(ROLLOUT, {})
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_that_hangs_is_given_up(kind: str) -> None:
    release = threading.Event()

    def hangs(**_: Any) -> list[float]:
        release.wait(30)
        return [0.0, 0.0, 0.0]

    async def sleeps(**_: Any) -> list[float]:
        await asyncio.sleep(30)
        return [0.0, 0.0, 0.0]

    scorer = Scorer([constant(1.0, 2.0, 3.0), hangs if kind == "sync" else sleeps], timeout=0.1)
    name = "hangs" if kind == "sync" else "sleeps"
    with pytest.raises(RewardError, match=rf"^Reward function '{name}' timed out \(0\.1 s\): .*reward_timeout"):
        scorer(ROLLOUT, {})
    release.set()


def test_a_function_within_its_time_is_untouched() -> None:
    assert Scorer([constant(1.0, 2.0, 3.0)], timeout=30.0)(ROLLOUT, {})[:, 0].tolist() == [1.0, 2.0, 3.0]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        ([], "returned 0 values for 3 completions"),
        ([1.0, "2.0", 3.0], "returned '2.0' for completion 1"),
        ([1.0, NAN, 3.0], "returned nan for completion 1: return a finite number, or None to abstain"),
        ([1.0, 2.0, INF], "returned inf for completion 2"),
        ([-INF, 2.0, 3.0], "returned -inf for completion 0"),
        ([1e39, 2.0, 3.0], "for completion 0"),  # infinite in float32
        ([10**400, 2.0, 3.0], "for completion 0"),
        ([[1.0], [2.0], [3.0]], r"returned \[1.0\] for completion 0"),
        ([{"score": 1.0}, 2.0, 3.0], "for completion 0"),
        (1.0, "returned float: return a list"),
        (None, "returned NoneType: return a list"),
        ("abc", "returned str: return a list"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict: return a list"),
    ],
)
def test_bad_return_values(values: Any, message: str) -> None:
    def judge(**_: Any) -> Any:
        return values

    with pytest.raises(RewardError, match=rf"^Reward function 'judge'.*{message}") as raised:
        Scorer([judge])(ROLLOUT, {})
    assert "\n" not in str(raised.value)


def test_bad_arguments() -> None:
    with pytest.raises(
        TypeError, match=r"^A reward function must be a callable, a model or a model's name, not int\.$"
    ):
        Scorer([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^reward_processing_classes has 2 entries for 1 reward functions"):
        Scorer([constant()], tokenizers=[None, None])


# Names ---------------------------------------------------------------------------------------------------------------


class Judge:
    def __call__(self, **_: Any) -> list[float]:
        return []

    def method(self, **_: Any) -> list[float]:
        return []


class NamedModel(nn.Module):
    def __init__(self, name_or_path: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"name_or_path": name_or_path})()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (constant(), "returns"),
        (partial(constant()), "returns"),
        (Judge(), "Judge"),
        (Judge().method, "method"),
        (partial(Judge(), x=1), "Judge"),
        ("organisation/reward-model", "reward-model"),
        ("/models/reward-model/", "reward-model"),
        (NamedModel("organisation/other-model"), "other-model"),
        (NamedModel(""), "NamedModel"),
    ],
)
def test_names(function: Any, name: str) -> None:
    assert name_of(function) == name


def test_equal_names_are_numbered() -> None:
    assert Scorer([Judge(), constant(), Judge(), Judge()]).names == ["Judge_1", "returns", "Judge_2", "Judge_3"]


def test_numbered_names_avoid_those_that_exist() -> None:
    def returns_1(**_: Any) -> list[float]:
        return []

    names = Scorer([constant(), constant(), returns_1]).names
    assert len(set(names)) == 3


# Models --------------------------------------------------------------------------------------------------------------


def direct(model: nn.Module, ids: list[int]) -> float:
    """The score of one row without padding, from the model's own forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_model_scores_prompt_and_completion(batch_size: int) -> None:
    model, tokenizer = tiny_classifier(seed=1), word_tokenizer()
    # Ids: the 7, a 8, cat 9, dog 10, sat 12.
    expected = [direct(model, [7, 9, 12]), direct(model, [8, 10]), direct(model, [7, 9, 7, 9, 12, 12])]
    assert len({round(score, 3) for score in expected}) == 3
    scorer = Scorer([model.train()], tokenizers=[tokenizer], batch_size=batch_size)
    total = scorer(texts(["the cat", "a", "the cat the"], [" sat", " dog", " cat sat sat"]), {"column": [1, 2, 3]})[
        :, 0
    ]
    assert total.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Recorder(nn.Module):
    """A model that keeps what it was given and scores 0."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.inputs: dict[str, torch.Tensor] = {}

    def forward(self, **inputs: torch.Tensor) -> Any:
        self.inputs = inputs
        return SequenceClassifierOutput(logits=torch.zeros(len(inputs["input_ids"]), 1))


def test_a_model_is_given_rows_padded_on_the_right_without_special_tokens() -> None:
    """Though the tokenizer pads on the left, as for generating, and would begin a text with a token of its own."""
    model, tokenizer = Recorder(), word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 3)]
    )
    assert tokenizer("cat")["input_ids"] == [3, 9]
    assert tokenizer.padding_side == "left"
    Scorer([model], tokenizers=[tokenizer])(texts(["the cat", "a"], [" sat", " dog"]), {})
    assert model.inputs["input_ids"].tolist() == [[7, 9, 12], [8, 10, 0]]
    assert model.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert model.config.pad_token_id == 0


def test_a_model_scores_conversations_through_the_template() -> None:
    model = tiny_classifier(seed=2)
    asks = [[{"role": "user", "content": "the cat"}], [{"role": "user", "content": "dog"}]]
    answers = [[{"role": "assistant", "content": "sat"}], [{"role": "assistant", "content": "a bird sat"}]]
    # <start> 3, newline 4, user 5, assistant 6, EOS 1
    expected = [
        direct(model, [3, 5, 4, 7, 9, 1, 4, 3, 6, 4, 12, 1, 4]),
        direct(model, [3, 5, 4, 10, 1, 4, 3, 6, 4, 8, 11, 12, 1, 4]),
    ]
    total = Scorer([model], tokenizers=[word_tokenizer(CHAT_TEMPLATE)])(texts(asks, answers), {})[:, 0]
    assert total.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_chat_template_kwargs_reach_the_models_template() -> None:
    model = tiny_classifier(seed=2)
    template = "{{ messages[0]['content'] }} {{ messages[1]['content'] }}{% if loud %} bird{% endif %}"
    chat = texts([[{"role": "user", "content": "the"}]], [[{"role": "assistant", "content": "cat"}]])
    scorer = Scorer([model], tokenizers=[word_tokenizer(template)], chat_template_kwargs={"loud": True})
    assert scorer(chat, {})[:, 0].item() == pytest.approx(direct(model, [7, 9, 11]), rel=1e-4)


def test_a_model_that_gives_no_single_score_of_its_own_is_refused(tmp_path: Path) -> None:
    """Another label would be read for the score, or a score head that was drawn at random."""
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification' has 2 labels, and a score is one number"):
        Scorer([tiny_classifier(num_labels=2)], [word_tokenizer()])
    with pytest.raises(TypeError, match=r"^The reward model Linear is none of Transformers: give a function that"):
        Scorer([nn.Linear(1, 1)], [word_tokenizer()])
    writes = Scorer([tiny_llama()], [word_tokenizer()])
    with pytest.raises(
        RewardError, match=r"'LlamaForCausalLM' gives \(\d+, 25\) numbers a completion: give a sequence"
    ):
        writes(texts(["the cat"], ["sat"]), {})
    with pytest.raises(
        ValueError, match=r"holds no 'score.weight', which would be random: give the checkpoint of a seq"
    ):
        Scorer([saved_model(tmp_path / "lm")])
    tiny_classifier(num_labels=2).save_pretrained(tmp_path / "two")
    word_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds 'score.weight' of shape \(2, 16\), and \(1, 16\) is needed"):
        Scorer([str(tmp_path / "two")])
    with pytest.raises(FileNotFoundError, match=r"^The reward model '/no/such' does not exist"):
        Scorer(["/no/such"])


def test_a_model_by_its_folder_and_one_that_knows_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    model = tiny_classifier(seed=3)
    model.save_pretrained(folder)
    word_tokenizer(pad=False).save_pretrained(folder)  # padding is then the EOS
    expected = [direct(model, [7, 9, 12]), direct(model, [8, 10])]
    by_object = type(model).from_pretrained(folder)
    scorer = Scorer([str(folder), by_object])
    assert scorer.names == ["judge_1", "judge_2"]
    by_function = scorer(texts(["the cat", "a"], [" sat", " dog"]), {})
    for column in by_function.unbind(dim=1):
        assert column.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


# Sentiment -----------------------------------------------------------------------------------------------------------

# Sentences and compound scores printed in the README of vaderSentiment.
PUBLISHED = {
    "VADER is smart, handsome, and funny.": 0.8316,
    "The book was good.": 0.4404,
    "At least it isn't a horrible book.": 0.431,
    "Today SUX!": -0.5461,
    "Not bad at all": 0.431,
}


def test_sentiment_of_texts_and_conversations() -> None:
    pytest.importorskip("vaderSentiment")
    assert vader_sentiment(completions=list(PUBLISHED), prompts=[], anything=1) == pytest.approx(
        list(PUBLISHED.values())
    )
    chat = [[{"role": "assistant", "content": text}] for text in PUBLISHED]
    assert vader_sentiment(completions=chat) == pytest.approx(list(PUBLISHED.values()))


def test_sentiment_of_clear_texts() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad, plain = vader_sentiment(
        ["I love this wonderful film!", "I hate this awful, horrible film.", "The table has legs."]
    )
    assert good > 0.5
    assert bad < -0.5
    assert plain == 0.0


def test_sentiment_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    _analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'trl-ext\[sentiment\]'"):
        vader_sentiment(["good"])


# As the reward model of TRL 1.12's PPOTrainer ------------------------------------------------------------------------


def test_answers_that_all_end_early_are_told_from_their_prompts() -> None:
    """TRL generates as far as the longest answer goes, and gives prompt and answer in one row."""
    seen: list[tuple[str, str]] = []

    def judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(text.split())) for text in completions]

    policy = SimpleNamespace(generate=lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[9, 1], [10, 1]])], 1))
    module = RewardModule(judge, word_tokenizer(), policy)
    ids = policy.generate(input_ids=torch.tensor([[7, 8, 11], [0, 7, 12]]))
    out = module.backbone(input_ids=ids, attention_mask=ids != 0)
    assert seen == [("the a bird", "cat"), ("the sat", "dog")]
    assert out.hidden_states[-1][:, -1, 0].tolist() == [1.0, 1.0]


# Ready-made functions, by their short and their old names -------------------------------------------------------------


def test_ready_made_functions_are_found_at_both_paths() -> None:
    old = {
        "texts": "length_penalty repetition_penalty matches json_schema keywords forbidden limited",
        "models": "classifier fluency reward_role",
        "sentiment": "vader_sentiment",
        "similarity": "chrf",
        "remote": "remote",
    }
    for module, names in old.items():
        for name in names.split():
            assert getattr(rewards, name) is getattr(import_module(f"trl_ext.rewards.{module}"), name)
            assert getattr(rewards, name) is getattr(getattr(rewards, module), name)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """At the top of a file there are none, so `import trl_ext.rewards` works without them."""
    for path in Path(rewards.__path__[0]).glob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        packages = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
        packages |= {str(node.module).split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
        assert not packages & {"vaderSentiment", "sacrebleu", "jsonschema", "httpx2"}, path


def test_a_function_in_a_thread_has_the_callers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name "cuda" alone a thread of its own would take the first one, on every process."""
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: taken.append((threading.current_thread().name, number)))

    def plain(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    async def awaited(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    Scorer([plain, awaited], timeout=5.0)(ROLLOUT, {})
    assert taken == [("trl_ext-reward", 3), ("trl_ext-loop", 3)]
