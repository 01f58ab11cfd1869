"""The remote reward against a real server on this machine."""

import asyncio
import time
from typing import Any

import pytest

from tests.helpers import rollout
from tests.reward_server import Server
from trl_ext.rewards import RewardError, Scorer
from trl_ext.rewards.protocol import arguments_of
from trl_ext.rewards.remote import remote


def ask(server_url: str, completions: list[str], **settings: Any) -> list[float | None]:
    settings = {"backoff": 0.01, "timeout": 10, **settings}
    reward = remote(server_url, **settings)
    return asyncio.run(
        reward(prompts=["p"] * len(completions), completions=completions, animal=["cat"] * len(completions))
    )


WORDS = ["a", "bb", "ccc", "dddd", "eeeee"]


def test_batches_come_back_in_order(reward_server: Server) -> None:
    assert ask(reward_server.url, WORDS, batch_size=2, columns=["animal"]) == [1, 2, 3, 4, 5]
    assert sorted(len(request["completions"]) for request in reward_server.requests) == [1, 2, 2]
    assert all(set(request) == {"prompts", "completions", "animal"} for request in reward_server.requests)
    assert 2 <= reward_server.most_together <= 3


def test_no_more_requests_at_a_time_than_allowed(reward_server: Server) -> None:
    ask(reward_server.url, WORDS, batch_size=1, concurrency=2)
    assert reward_server.most_together == 2


@pytest.mark.parametrize("trouble", [500, 503, 429, "hang up", "sleep"])
def test_passing_troubles_are_retried(reward_server: Server, trouble: Any) -> None:
    reward_server.troubles = [trouble, trouble]
    assert ask(reward_server.url, WORDS, timeout=0.5 if trouble == "sleep" else 10) == [1, 2, 3, 4, 5]
    assert len(reward_server.requests) == 3


def test_pauses_grow(reward_server: Server) -> None:
    reward_server.troubles = [500, 500, 500]
    started = time.perf_counter()
    ask(reward_server.url, WORDS, backoff=0.1)
    assert time.perf_counter() - started >= 0.1 + 0.2 + 0.4


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (404, "answered status 404"),
        (302, "answered status 302"),
        ({"points": []}, r'must answer \{"scores"'),
        ({"scores": [1]}, "one score a completion, 5 of them"),
    ],
)
def test_lasting_troubles_are_not_retried(reward_server: Server, trouble: Any, message: str) -> None:
    reward_server.troubles = [trouble]
    with pytest.raises((ConnectionError, ValueError), match=message):
        ask(reward_server.url, WORDS)
    assert len(reward_server.requests) == 1


def test_a_server_that_is_gone_is_one_clear_failure(reward_server: Server) -> None:
    url = reward_server.url
    reward_server.shutdown()
    reward_server.server_close()
    expected = rf"^Reward function 'remote' raised ConnectionError: {url} gave no answer in 3 attempts"
    with pytest.raises(RewardError, match=expected):
        Scorer([remote(url, retries=2, backoff=0.01)])(rollout([2, 1], [True, True]), {})


def test_only_http() -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        remote("file:///etc/passwd")


def test_a_column_that_is_not_there_is_missed_before_the_run_and_said_where_nobody_asked(reward_server: Server) -> None:
    with pytest.raises(TypeError, match="asks for 'answer'"):
        arguments_of(remote(reward_server.url, columns=["answer"]), ["prompts", "completions"])
    asked = arguments_of(remote(reward_server.url, columns=["answer"]), ["prompts", "completions", "answer", "other"])
    assert asked == ["prompts", "completions", "answer"], "what is not sent along is not asked for"
    with pytest.raises(ValueError, match="no column 'colour', which is to be sent along"):  # by TRL's own trainers
        ask(reward_server.url, WORDS, columns=["colour"])
    assert not reward_server.requests


def test_columns_whose_names_are_none_in_python(reward_server: Server) -> None:
    asks = remote(reward_server.url, columns=["ground-truth", "class", "prompts"])
    assert arguments_of(asks, ["prompts", "completions", "ground-truth"]) == ["prompts", "completions", "ground-truth"]
    sent = {"ground-truth": ["a", "b"], "class": ["c", "d"]}
    Scorer([asks])(rollout([2, 1], [True, True]), sent)
    assert {**reward_server.requests[0], **sent} == reward_server.requests[0]
