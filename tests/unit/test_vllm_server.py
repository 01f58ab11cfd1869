"""vLLM servers that answer, restart, hang and go, against a stand-in with a true model behind it."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import move_policy, tiny_llama, word_tokenizer
from tests.vllm_server import StandIn
from trl_ext import SharedBase
from trl_ext.generation import (
    GenerationError,
    TransformersGenerator,
    VLLMServerGenerator,
    VLLMServers,
    generate,
    vllm_probe,
    vllm_server,
)
from trl_ext.generation.vllm_server import AdapterFolders
from trl_ext.tokens import side_by_side

PROMPTS = [[7, 9, 12], [8], [5, 6, 7, 8], [10, 11], [14], [13, 5], [9, 9], [6]]
EOS = [15, 16, 17]


def how(**changes: Any) -> GenerationConfig:
    plain: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": EOS}
    return GenerationConfig(**{**plain, **changes})


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_probe, "TOKENS", 4)
    monkeypatch.setattr(vllm_probe, "PROMPTS", 4)


@pytest.fixture
def base() -> SharedBase:
    """Roles whose policy is not the base."""
    return move_policy(SharedBase.from_model(tiny_llama(), value="head"))


@pytest.fixture
def servers() -> Iterator[list[StandIn]]:
    started = [StandIn(tiny_llama()), StandIn(tiny_llama())]
    yield started
    for server in started:
        server.stop()


def generator_of(base: SharedBase, folder: Path, *servers: StandIn, **settings: Any) -> VLLMServerGenerator:
    client = VLLMServers([server.url for server in servers], **{"wait": 5.0, "timeout": 20.0, **settings})
    return VLLMServerGenerator(base, client, folder, tolerance=0.02)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_greedy_completions_are_those_of_generate(
    role: str, count: int, base: SharedBase, servers: list[StandIn], tmp_path: Path
) -> None:
    greedy = how(do_sample=False)
    expected = TransformersGenerator(base, 8).answers(PROMPTS, greedy, role)
    generator = generator_of(base, tmp_path, *servers[:count])
    said = generate(_Ids(generator), ["the cat", "a"], word_tokenizer(), greedy, role=role)
    own = generate(TransformersGenerator(base, 8), ["the cat", "a"], word_tokenizer(), greedy, role=role)
    assert torch.equal(said.completion_ids, own.completion_ids)
    answers = generator.answers(PROMPTS, greedy, role)
    until_eos = [row[: next((i + 1 for i, t in enumerate(row) if t in EOS), len(row))] for row in expected.ids]
    assert answers.ids == until_eos


class _Ids:
    """A generator whose log-probs are left out."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def answers(self, *asked: Any) -> Any:
        return self.inner.answers(*asked).ids


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.8, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("processed", [True, False])
def test_log_probs_are_those_that_sampled_or_none(
    processed: bool, settings: dict[str, Any], base: SharedBase, servers: list[StandIn], tmp_path: Path
) -> None:
    """A server with raw log-probs says nothing of a sampling that is not plain."""
    for server in servers:
        server.processed = processed
    generator = generator_of(base, tmp_path, *servers)
    assert generator.processed is processed
    answers = generator.answers(PROMPTS, how(**settings), "policy")
    if settings and not processed:
        assert answers.logprobs is None
        return
    ids, mask, width = side_by_side(PROMPTS, answers.ids)
    assert answers.logprobs is not None
    own = base.logprobs(ids, mask, width, temperature=settings.get("temperature", 1.0)).tolist()
    pairs = [(x, y) for row, told in zip(own, answers.logprobs, strict=True) for x, y in zip(row, told, strict=False)]
    if "top_p" in settings:
        assert sum(y for _, y in pairs) > sum(x for x, _ in pairs)
    else:
        assert [y for _, y in pairs] == pytest.approx([x for x, _ in pairs], abs=1e-4)


def test_what_is_asked_is_all_that_samples(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator = generator_of(base, tmp_path, servers[0])
    torch.manual_seed(3)
    generator.answers(PROMPTS, how(top_p=0.9, min_p=0.1, temperature=0.7), "policy")
    bodies = servers[0].asked[-len(PROMPTS) :]
    assert sorted(body["prompt"] for body in bodies) == sorted(PROMPTS)
    assert len({body["seed"] for body in bodies}) == len(PROMPTS), "each its own random numbers"
    for body in bodies:
        body = {name: value for name, value in body.items() if name not in ("prompt", "seed", "model")}
        assert body == {
            "max_tokens": 6,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": EOS,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }


def test_random_numbers_are_torchs(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator, drawn = generator_of(base, tmp_path, *servers), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(generator.answers(PROMPTS, how(), "policy").ids)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_adapter_goes_over_once_and_the_one_before_is_forgotten(
    base: SharedBase, servers: list[StandIn], tmp_path: Path
) -> None:
    server = servers[0]
    generator, names = generator_of(base, tmp_path, server), []
    assert server.adapters == {} and list(tmp_path.iterdir()) == [], "the probe leaves nothing"
    before = len(server.loads)
    for _ in range(3):
        for _ in range(2):
            generator.answers(PROMPTS, how(), "policy")
        [name] = server.adapters
        assert [path.name for path in tmp_path.iterdir()] == [name]
        names.append(name)
        with torch.no_grad():
            base.trainable_parameters("policy")[0].add_(0.1)
    assert server.loads[before:] == names and len(set(names)) == 3


def test_another_process_may_have_loaded_it(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    one, other = (generator_of(base, tmp_path, servers[0]) for _ in range(2))
    before = len(servers[0].loads)
    one.answers(PROMPTS, how(), "policy")
    other.answers(PROMPTS, how(), "policy")
    assert len(servers[0].loads) == before + 1


# The probe -----------------------------------------------------------------------------------------------------------


def test_another_base_is_refused(base: SharedBase, tmp_path: Path) -> None:
    other = StandIn(tiny_llama(seed=1))
    with pytest.raises(ValueError, match=r"^The vLLM server at http://127\.0\.0\.1:\d+ does not speak for this base"):
        generator_of(base, tmp_path, other)
    other.stop()


def test_a_stale_adapter_is_refused(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    servers[1].stale = True
    before = [parameter.clone() for parameter in base.trainable_parameters("policy")]
    with pytest.raises(ValueError, match=rf"^The vLLM server at {servers[1].url} speaks for this base, but not for"):
        generator_of(base, tmp_path, *servers)
    after = base.trainable_parameters("policy")
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "the policy is as it was"
    assert set(base.adapters) == {"policy", "reference", "value"}


def test_a_server_that_loads_no_adapters_is_refused(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    servers[0].updating = False
    with pytest.raises(ValueError, match=r"refuses: it loads no adapters: start it with VLLM_ALLOW"):
        generator_of(base, tmp_path, servers[0])


def test_an_address_may_end_as_those_of_openai_s_clients_do(servers: list[StandIn]) -> None:
    for end in ("", "/", "/v1", "/v1/"):
        VLLMServers([servers[0].url + end], wait=1.0).wait_until_up()


def test_a_server_that_is_not_there_is_named(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    servers[1].stop()
    with pytest.raises(ConnectionError, match=rf"^No vLLM server is up at {servers[1].url} after 0\.3 s: start one"):
        generator_of(base, tmp_path, *servers, wait=0.3)
    servers[1].start()


# What may go wrong ---------------------------------------------------------------------------------------------------


def test_a_server_that_restarts_in_the_middle(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    """It is waited for, given the adapter again, and asked again for what it left undone."""
    server = servers[0]
    generator = generator_of(base, tmp_path, server)
    torch.manual_seed(5)
    expected = generator.answers(PROMPTS, how(), "policy")
    server.die_after = len(server.asked) + 4
    threading.Thread(target=_restart, args=(server,), daemon=True).start()
    torch.manual_seed(5)
    assert generator.answers(PROMPTS, how(), "policy") == expected
    assert len(server.adapters) == 1 and server.loads[-1] == server.loads[-2]


def _restart(server: StandIn) -> None:
    while not server._server.socket._closed:  # type: ignore[attr-defined]
        time.sleep(0.02)
    time.sleep(0.3)
    server.start()


def test_a_server_that_restarted_between_rollouts(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator = generator_of(base, tmp_path, servers[0])
    torch.manual_seed(5)
    expected = generator.answers(PROMPTS, how(), "policy")
    servers[0].stop()
    servers[0].start()
    torch.manual_seed(5)
    assert generator.answers(PROMPTS, how(), "policy") == expected


def test_one_of_two_servers_is_gone(
    base: SharedBase, servers: list[StandIn], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = generator_of(base, tmp_path, *servers, wait=0.5)
    torch.manual_seed(5)
    expected = generator.answers(PROMPTS, how(), "policy")
    servers[0].die_after = len(servers[0].asked) + 2
    for _ in range(2):
        torch.manual_seed(5)
        assert generator.answers(PROMPTS, how(), "policy") == expected
    servers[0].start()  # and is there again
    before = len(servers[0].asked)
    torch.manual_seed(5)
    assert generator.answers(PROMPTS, how(), "policy") == expected
    assert len(servers[0].asked) > before


def test_no_server_is_left(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator = generator_of(base, tmp_path, *servers, wait=0.3)
    for server in servers:
        server.stop()
    with pytest.raises(GenerationError, match=r"^No vLLM server answers any more at .*: start one again\.$"):
        generator.answers(PROMPTS, how(), "policy")
    for server in servers:
        server.start()


def test_a_request_that_is_not_answered_is_asked_again(
    base: SharedBase, servers: list[StandIn], tmp_path: Path
) -> None:
    server = servers[0]
    generator = generator_of(base, tmp_path, server, timeout=3.0)
    torch.manual_seed(5)
    expected = generator.answers(PROMPTS, how(), "policy")
    before = len(server.asked)
    server.hang_after, server.silence = before + 3, 60.0
    torch.manual_seed(5)
    assert generator.answers(PROMPTS, how(), "policy") == expected
    assert len(server.asked) > before + len(PROMPTS)


def test_a_server_that_fails_again_and_again(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator = generator_of(base, tmp_path, servers[0])
    servers[0].failures = [503, 500]
    assert len(generator.answers(PROMPTS, how(), "policy").ids) == len(PROMPTS)
    servers[0].failures = [500] * 100
    with pytest.raises(GenerationError, match=r"^vLLM gave no answer in 4 attempts \(last: .*500: out of"):
        generator.answers(PROMPTS, how(), "policy")
    servers[0].failures = [400]
    with pytest.raises(GenerationError, match=r"refuses: out of order \(status 400\)\.$"):
        generator.answers(PROMPTS, how(), "policy")


def test_a_completion_that_was_cut_off_is_refused(base: SharedBase, servers: list[StandIn], tmp_path: Path) -> None:
    generator = generator_of(base, tmp_path, servers[0])
    servers[0]._sampled = lambda model, body: ([7], [-1.0])  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match=r"^A completion was cut off after 1 of 6 tokens"):
        generator.answers(PROMPTS, how(), "policy")


def test_processes_call_one_adapter_alike_and_their_probes_apart(
    base: SharedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes its sets as lists, in another order in each process."""
    folders, save = AdapterFolders(base, tmp_path), type(base.model).save_pretrained

    def otherwise(self: Any, folder: str, **settings: Any) -> None:
        save(self, folder, **settings)
        for file in Path(folder).rglob("adapter_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            assert len(config["target_modules"]) > 1
            file.write_text(json.dumps({**config, "target_modules": config["target_modules"][::-1]}), encoding="utf-8")

    first, probe = folders.write("policy"), folders.write("policy", own=True)
    monkeypatch.setattr(type(base.model), "save_pretrained", otherwise)
    assert folders.write("policy") == first and len({first, probe, folders.write("policy", own=True)}) == 3
    with torch.no_grad():
        base.trainable_parameters("policy")[0].add_(0.1)
    assert folders.write("policy") != first


def test_all_that_the_trainer_could_change_is_taken_before_the_thread_begins(
    base: SharedBase, servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, begun, found = generator_of(base, tmp_path, servers[0]), vllm_server.in_background, []

    def looked_at(work: Any) -> Any:
        found.append((torch.get_rng_state().tolist(), len(list(tmp_path.iterdir()))))
        return begun(work)

    monkeypatch.setattr(vllm_server, "in_background", looked_at)
    torch.manual_seed(3)
    before = torch.get_rng_state().tolist()
    generator.begin(PROMPTS, how(), "policy").result()
    [(state, adapters)] = found
    assert state != before and state == torch.get_rng_state().tolist() and adapters == 1


def test_an_adapter_stays_until_what_it_answers_is_there(
    base: SharedBase, servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, gate, later = generator_of(base, tmp_path, servers[0]), threading.Event(), []
    complete = generator.servers.complete
    monkeypatch.setattr(generator.servers, "complete", lambda *args: gate.wait(20) and complete(*args))
    first = generator.begin(PROMPTS, how(), "policy")
    [folder] = tmp_path.iterdir()
    with torch.no_grad():
        base.trainable_parameters("policy")[0].add_(0.1)
    second = threading.Thread(target=lambda: later.append(generator.begin(PROMPTS, how(), "policy")))
    second.start()
    second.join(0.5)
    assert second.is_alive() and folder.is_dir()
    gate.set()
    second.join()
    assert len(first.result().ids) == len(later[0].result().ids) == len(PROMPTS) and not folder.is_dir()
