"""Several policies over one base: their answers in a file, figures, judges, and the two commands."""

import asyncio
import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.parity.tiny import EOS, config_of, save_base, save_policy_adapter, save_reward_adapter
from tests.reward_server import Server
from trl_ext import evaluation
from trl_ext.cli import main
from trl_ext.commands.policies import _said_by_people
from trl_ext.evaluation import Cast, Comparison, Interval, Sampling, Spec, win_rates
from trl_ext.evaluation.judges import ModelJudge, compared, pairs_of, verdict_of
from trl_ext.evaluation.policies import Drawn, Policies, uniforms
from trl_ext.evaluation.result import as_json
from trl_ext.rating import Store
from trl_ext.roles import adapters

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w13 w14"]
ROWS = [{"prompt": prompt, "wanted": f"w{20 + i}"} for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = save_base(folder / "model", config_of("llama"))
    save_policy_adapter(folder / "one", base, seed=1)
    save_policy_adapter(folder / "two", base, seed=2)
    save_reward_adapter(folder / "judge", base, seed=3)
    save_reward_adapter(folder / "other", base, seed=4)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cast(files: Path) -> Cast:
    policies = ["base=base", f"one={files / 'one'}", f"two={files / 'two'}"]
    return Cast.checked(str(files / "model"), policies, [files / "judge", files / "other"])


@pytest.fixture(scope="module")
def policies(cast: Cast) -> Policies:
    return cast.loaded(cast.tokenizer())


def wanted(completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    """A reward function that needs a further column of the prompts."""
    return [float(word in text.split()) for text, word in zip(completions, wanted, strict=True)]


@torch.no_grad()
def plain_logprob(base: str, adapter: Path | None, row: dict[str, Any], temperature: float = 1.0) -> float:
    """Of a completion, by plain Transformers and PEFT: all logits, a softmax, a gather."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    asked = [int(word[1:]) for word in row["prompt"].split()]
    ids = torch.tensor([asked + row["completion_ids"]])
    logprobs = (model.eval()(ids).logits[0, len(asked) - 1 : -1].double() / temperature).log_softmax(-1)
    return float(logprobs.gather(1, ids[0, len(asked) :, None]).sum())


# Answers -------------------------------------------------------------------------------------------------------------


def test_random_numbers_follow_from_the_rows_key_alone() -> None:
    one, two = [0, 3, "base", 1], [0, 4, "base", 1]
    together = uniforms([one, two], 5)
    assert torch.equal(together[1], uniforms([two], 5)[0])
    assert not torch.equal(together[0], together[1])
    assert together.min() >= 0 and together.max() < 1


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.3, -1.0, -torch.inf, 1.5, 0.0])
    rows, temperature = 20_000, 0.7
    numbers = torch.rand(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = Drawn(numbers, temperature, width=3)(torch.zeros(rows, 3, dtype=torch.long), logits.repeat(rows, 1))
    assert (drawn.isfinite().sum(dim=1) == 1).all()
    shares = drawn.argmax(dim=1).bincount(minlength=5) / rows
    assert shares == pytest.approx(torch.softmax(logits / temperature, 0), abs=4 * 0.5 / math.sqrt(rows))
    assert shares[2] == 0


def test_rows_say_what_plain_models_say(files: Path, cast: Cast, tmp_path: Path) -> None:
    rows = evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(2, 6, temperature=0.8, batch_size=3), [wanted])
    assert [row["id"] for row in rows[:4]] == ["0-base-0", "0-one-0", "0-two-0", "0-base-1"]
    assert len(rows) == len({row["id"] for row in rows}) == 4 * 2 * 3
    folders = {"base": None, "one": files / "one", "two": files / "two"}
    model = str(files / "model")
    for row in rows[::5] + rows[1::7]:
        own = plain_logprob(model, folders[row["policy"]], row, 0.8)
        base = plain_logprob(model, None, row, 0.8)
        assert row["logprob"] == pytest.approx(own, abs=1e-4)
        assert row["kl"] == pytest.approx(own - base, abs=1e-4)
        assert row["tokens"] == len(row["completion_ids"]) <= 6
        assert row["ended"] == (row["completion_ids"][-1] == EOS)
        assert row["scores"]["wanted"] == float(row["wanted"] in row["completion"].split())
        assert row["score"] == pytest.approx(sum(row["scores"].values()) / 3)
    assert any(abs(row["kl"]) > 0.01 for row in rows if row["policy"] != "base")
    assert all(row["kl"] == 0 for row in rows if row["policy"] == "base")


@torch.no_grad()
def test_each_reward_role_scores_as_a_plain_classifier(files: Path, cast: Cast, tmp_path: Path) -> None:
    rows = evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 5))
    for name in ("judge", "other"):
        plain = AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=1)
        plain = PeftModel.from_pretrained(plain, files / name).eval()
        for row in rows[::4]:
            ids = torch.tensor([[int(word[1:]) for word in row["prompt"].split()] + row["completion_ids"]])
            assert row["scores"][name] == pytest.approx(float(plain(ids).logits), abs=1e-5)


def test_there_is_one_base(files: Path, policies: Policies) -> None:
    own = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(files / "model").parameters())
    found = sum(p.numel() for name, p in policies.model.named_parameters() if "lora_" not in name)
    assert found == own
    assert len({name for name in policies.policies.values() if name}) == 2 and len(policies.rewards) == 2
    assert not any(parameter.requires_grad for parameter in policies.parameters())


def test_the_same_random_numbers_make_equal_policies_say_the_same(files: Path, tmp_path: Path) -> None:
    twice = Cast.checked(str(files / "model"), [f"x={files / 'one'}", f"y={files / 'one'}"])
    shared = evaluation.sample(twice, ROWS, tmp_path / "s.jsonl", Sampling(2, 6, shared_seeds=True))
    own = evaluation.sample(twice, ROWS, tmp_path / "o.jsonl", Sampling(2, 6))
    texts = [[[row["completion"] for row in rows if row["policy"] == name] for name in "xy"] for rows in (shared, own)]
    assert texts[0][0] == texts[0][1]
    assert texts[1][0] != texts[1][1]


def test_temperature_0_takes_the_likeliest(files: Path, policies: Policies) -> None:
    rollout = policies.sample("one", PROMPTS, uniforms([(i,) for i in range(4)], 5), temperature=0.0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), files / "one")
    for prompt, ids in zip(PROMPTS, rollout.completion_tokens, strict=True):
        asked = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        greedy = plain.generate(input_ids=asked, max_new_tokens=5, do_sample=False)[0, asked.shape[1] :].tolist()
        assert ids == greedy


# Going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 700, 2500, 2501])
def test_a_file_cut_anywhere_is_gone_on_with(cast: Cast, policies: Policies, tmp_path: Path, cut: int) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    how = Sampling(2, 6, batch_size=3)
    rows = evaluation.sample(cast, ROWS, whole, how, load=lambda: policies)
    shutil.copy(f"{whole}.settings.json", f"{part}.settings.json")
    part.write_bytes(whole.read_bytes()[:cut])
    assert evaluation.sample(cast, ROWS, part, how, load=lambda: policies) == rows
    assert part.read_bytes() == whole.read_bytes()


def test_a_finished_file_needs_no_model(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    rows = evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 4), load=lambda: policies)

    def never() -> Policies:
        raise AssertionError("loaded")

    assert evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 4), load=never) == rows


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(files: Path, tmp_path: Path) -> None:
    many = tmp_path / "prompts.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"w{i + 3} w7"}) + "\n" for i in range(60)))
    line = [str(files / "model"), "--policy", "base=base", f"one={files / 'one'}", "--prompts", str(many)]
    line += ["--max-new-tokens", "8", "--batch-size", "3", "--out"]
    assert main(["sample", *line, str(tmp_path / "whole.jsonl")]) == 0
    out = tmp_path / "killed.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "trl_ext.cli", "sample", *line, str(out)], cwd=Path.cwd())
    while not out.exists() or out.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_bytes().count(b"\n") < 120
    assert main(["sample", *line, str(out)]) == 0
    rows, whole = ([json.loads(line) for line in file.open()] for file in (out, tmp_path / "whole.jsonl"))
    for row, expected in zip(rows, whole, strict=True):
        # Another process may use another number of threads, and so another order of sums.
        for name in ("logprob", "kl"):
            assert row.pop(name) == pytest.approx(expected.pop(name), abs=1e-4)
        assert row == expected


def test_other_settings_are_refused(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    evaluation.sample(cast, ROWS, out, Sampling(1, 4), load=lambda: policies)
    with pytest.raises(ValueError, match=r"was made with temperature 1\.0, and not with 0\.5"):
        evaluation.sample(cast, ROWS, out, Sampling(1, 4, temperature=0.5))
    with pytest.raises(ValueError, match="was made with prompts 4 with digest"):
        evaluation.sample(cast, ROWS[:3], out, Sampling(1, 4))
    Path(f"{out}.settings.json").unlink()
    with pytest.raises(FileExistsError, match="exists already"):
        evaluation.sample(cast, ROWS, out, Sampling(1, 4))


@pytest.mark.parametrize("trained", ["model", "one", "judge", "function"])
def test_what_was_trained_further_or_rewritten_is_other_settings(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    for name in ("model", "one", "judge"):
        shutil.copytree(files / name, tmp_path / name)
    for name in ("one", "judge"):
        config = tmp_path / name / adapters.CONFIG
        config.write_text(config.read_text().replace(str(files / "model"), str(tmp_path / "model")))
    module = tmp_path / f"scores_{trained}.py"
    module.write_text("class Constant:\n    def __call__(self, completions): return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    constant = importlib.import_module(module.stem).Constant()
    cast = Cast.checked(str(tmp_path / "model"), [f"x={tmp_path / 'one'}"], [tmp_path / "judge"])
    arguments = cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 4), [constant]
    rows = evaluation.sample(*arguments)
    assert evaluation.sample(*arguments) == rows
    if trained == "function":
        module.write_text(module.read_text().replace("1.0", "2.0"))
    else:
        [file] = (tmp_path / trained).glob("*.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    setting = {"model": "base", "one": "policies"}.get(trained, "rewards")
    with pytest.raises(ValueError, match=rf"was made with {setting} .*, and not with"):
        evaluation.sample(*arguments)


def test_what_vllm_began_the_base_does_not_go_on_with(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    """Whatever was set, and is not any more, is another setting too."""
    out = tmp_path / "a.jsonl"
    evaluation.sample(cast, ROWS[:1], out, Sampling(1, 4), load=lambda: policies)
    beside = tmp_path / "a.jsonl.settings.json"
    made = json.loads(beside.read_text(encoding="utf-8"))
    beside.write_text(json.dumps({**made, "sampled_by": "vLLM"}), encoding="utf-8")
    with pytest.raises(ValueError, match="was made with sampled_by vLLM, and not with None"):
        evaluation.sample(cast, ROWS[:1], out, Sampling(1, 4), load=lambda: policies)


def test_settings_of_a_file_without_answers_may_change(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    def fails() -> Policies:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 400), load=fails)
    rows = evaluation.sample(cast, ROWS, tmp_path / "a.jsonl", Sampling(1, 4), load=lambda: policies)
    assert max(row["tokens"] for row in rows) <= 4


# What is worth a person's time ---------------------------------------------------------------------------------------


def scored(prompt: str, number: int, **scores: float) -> dict[str, Any]:
    return {"id": f"{prompt}-{number}", "prompt": prompt, "completion": f"c{number}", "scores": scores}


def test_disagreement_takes_what_reward_models_see_differently() -> None:
    # y is x times 10 and plus 5, but for the fourth answer: scale and offset are no disagreement.
    rows = [scored("p", i, x=float(i), y=10.0 * i + 5) for i in range(6)]
    rows[3]["scores"]["y"] = -20.0
    assert [row["id"] for row in evaluation.pick(rows, "disagreement", 1, of="answers")] == ["p-3"]
    pair = evaluation.pick(rows, "disagreement", 1)
    assert "p-3" in {row["id"] for row in pair} and [row["item"] for row in pair] == [0, 0]


def test_closeness_takes_the_pairs_of_one_prompt_that_score_alike() -> None:
    rows = [scored("p", 0, x=1.0), scored("p", 1, x=1.5), scored("p", 2, x=3.0), scored("q", 3, x=1.01)]
    rows += [scored("q", 4, x=9.0), scored("p", 5, x=2.9)]
    picked = evaluation.pick(rows, "closeness", 2)
    assert [row["id"] for row in picked] == ["p-2", "p-5", "p-0", "p-1"]


def test_random_items_are_pairs_of_unlike_answers_each_once() -> None:
    rows = [{**scored(f"p{i // 4}", i % 2 if i < 4 else i), "id": str(i)} for i in range(16)]
    picked = evaluation.pick(rows, "random", 100, seed=1)
    assert len({row["id"] for row in picked}) == len(picked)
    for first, second in zip(picked[::2], picked[1::2], strict=True):
        assert first["prompt"] == second["prompt"] and first["completion"] != second["completion"]


# Figures -------------------------------------------------------------------------------------------------------------


def answer(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    tokens = len(completion.split())
    return {"prompt": prompt, "completion": completion, "tokens": tokens, "ended": True, "kl": 0.0, **more}


def test_figures_by_hand() -> None:
    rows = [
        answer("p", "a b c a b c", logprob=-6.0, kl=1.0, scores={"r": 1.0}),
        answer("p", "x y", logprob=-2.0, kl=0.0, scores={"r": None}),
        answer("q", "x y", logprob=-4.0, kl=2.0, scores={"r": 4.0}, ended=False),
    ]
    found = {name: figure.mean for name, figure in evaluation.figures(rows).items()}
    assert found["score/r"] == pytest.approx((1 + 4) / 2)
    assert found["kl"] == pytest.approx((0.5 + 2) / 2)
    assert found["length"] == pytest.approx((4 + 2) / 2)
    assert found["ended"] == pytest.approx((1 + 0) / 2)
    assert found["repetition"] == pytest.approx(((1 - 3 / 4) / 2 + 0) / 2)  # abc bca cab abc
    assert found["distinct"] == pytest.approx(((1 + 0.5) / 2 + 0.5) / 2)
    # Base's nats a token: -7/6 and -2/2 for p, -6/2 for q.
    assert found["perplexity"] == pytest.approx(math.exp(((7 / 6 + 1) / 2 + 3) / 2))


# A language model as judge -------------------------------------------------------------------------------------------


class JudgeServer(Server):
    """Answers chat completions as `say(first, second)` says."""

    path = "/v1"

    def __init__(self) -> None:
        super().__init__()
        self.say = longer

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        first, second = asked.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        return {"choices": [{"message": {"role": "assistant", "content": self.say(first, second)}}]}


def longer(first: str, second: str) -> str:
    return f"I looked at [[C]] and the like.\n[[{'A' if len(first) > len(second) else 'B'}]]"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pair(first: str, second: str, prompt: str = "p") -> tuple[dict[str, Any], dict[str, Any]]:
    a, b = (
        {**answer(prompt, text), "id": f"{prompt}-{name}", "policy": name}
        for name, text in zip("ab", (first, second), strict=True)
    )
    return a, b


def test_a_judge_is_asked_in_both_orders_and_once(server: JudgeServer, tmp_path: Path) -> None:
    judge = ModelJudge("m", server.url, tmp_path / "judge.jsonl", rubric="Be fair.", key="secret")
    pairs = [pair("long answer", "short"), pair("s", "longest answer", "q"), pair("same", "same", "r")]
    assert [(x.prompt, x.outcome) for x in compared(judge, pairs)] == [("p", 1.0), ("q", 0.0), ("r", 0.5)]
    assert len(server.requests) == 4  # equal answers cost nothing
    assert set(server.asked) == {("/v1/chat/completions", "Bearer secret")}
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "Be fair."}
    assert {r["messages"][1]["content"].count("long answer") for r in server.requests} == {0, 1}
    again = ModelJudge("m", server.url, tmp_path / "judge.jsonl", rubric="Be fair.")
    compared(again, pairs)
    assert len(server.requests) == 4
    compared(ModelJudge("m", server.url, tmp_path / "judge.jsonl", rubric="Be strict."), pairs)
    assert len(server.requests) == 8  # another rubric is another question


def test_a_judge_that_prefers_a_side_says_tie(server: JudgeServer, tmp_path: Path) -> None:
    server.say = lambda first, second: "[[A]]"
    judge = ModelJudge("m", server.url, tmp_path / "judge.jsonl")
    assert judge([pair("x", "y")]) == [0.5]


def test_a_judge_that_is_busy_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    server.troubles = [503, 429]
    judge = ModelJudge("m", server.url, tmp_path / "judge.jsonl", backoff=0.01)
    assert judge([pair("longer", "s")]) == [1.0]


def test_a_judge_is_asked_from_a_notebook_too(server: JudgeServer, tmp_path: Path) -> None:
    async def cell() -> list[float | None]:
        return ModelJudge("m", server.url, tmp_path / "judge.jsonl")([pair("longer", "s")])

    assert asyncio.run(cell()) == [1.0]


def test_what_a_judge_said_before_it_went_is_kept(server: JudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "judge.jsonl"
    server.troubles = [200, 200, 401]
    pairs = [pair("longer", "s", f"p{i}") for i in range(6)]
    with pytest.raises(evaluation.JudgeError, match=r"judge 'm' is gone: .*status 401.*the same command goes on"):
        ModelJudge("m", server.url, file, concurrency=1)(pairs)
    assert len(file.read_text().splitlines()) == 2
    assert len(server.requests) == 3  # after the first refusal nothing more is asked
    assert ModelJudge("m", server.url, file)(pairs) == [1.0] * 6
    assert len(server.requests) == 3 + 10


def test_a_pair_that_a_judge_refuses_is_left_out(server: JudgeServer, tmp_path: Path) -> None:
    """One that is too long for it, say; the next ones are not."""
    file = tmp_path / "judge.jsonl"
    server.troubles = [200, 200, 400]
    pairs = [pair("longer", "s", f"p{i}") for i in range(4)]
    assert ModelJudge("m", server.url, file, concurrency=1)(pairs) == [1.0, None, 1.0, 1.0]
    server.troubles = [400]
    assert ModelJudge("m", server.url, file)(pairs) == [1.0, None, 1.0, 1.0], "asked again, and refused again"
    assert ModelJudge("m", server.url, file)(pairs) == [1.0] * 4, "until somebody answers"
    many = [pair("longer", "s", str(i)) for i in range(20)]
    server.troubles = [400] * 10
    some = ModelJudge("m", server.url, tmp_path / "some.jsonl", concurrency=1)(many)
    assert some == [None] * 5 + [1.0] * 15, "those that come first are no more than the others"
    server.troubles = [400] * 100
    with pytest.raises(evaluation.JudgeError, match=r"^The judge 'm' refuses all that it is asked: .* status 400"):
        ModelJudge("m", server.url, tmp_path / "other.jsonl", concurrency=1)(
            [pair("x", "y", str(i)) for i in range(60)]
        )
    assert len(server.requests) < 180, "and is not asked for ever"


def test_a_prompt_that_stands_there_twice_is_compared_twice() -> None:
    rows = [
        {**answer("q", f"{policy}{number}"), "id": f"{number}-{policy}-0", "policy": policy, "sample": 0}
        for number in range(2)
        for policy in "ab"
    ]
    said = [(a["completion"], b["completion"]) for a, b in pairs_of(rows, ["a", "b"])]
    assert said == [("a0", "b0"), ("a1", "b1")]


def test_a_judge_that_names_no_winner(server: JudgeServer, tmp_path: Path) -> None:
    server.say = lambda first, second: "Both are lovely."
    with pytest.raises(evaluation.JudgeError, match=r"names no winner: it said 'Both are lovely\.'.*\[\[A\]\]"):
        ModelJudge("m", server.url, tmp_path / "j.jsonl")([pair("x", "y", str(i)) for i in range(40)])
    assert len(server.requests) < 40
    server.say = lambda first, second: "Hm." if "odd" in first + second else longer(first, second)
    pairs = [pair("longer", "s"), pair("odd", "y", "q"), pair("longer", "z", "t")]
    assert ModelJudge("m", server.url, tmp_path / "j.jsonl", concurrency=1)(pairs) == [1.0, None, 1.0]


def test_a_judge_that_nobody_hears(tmp_path: Path) -> None:
    judge = ModelJudge("m", "http://127.0.0.1:9/v1", tmp_path / "j.jsonl", retries=1, backoff=0.01)
    with pytest.raises(evaluation.JudgeError, match="is gone"):
        judge([pair("x", "y")])


@pytest.mark.parametrize(
    ("reply", "verdict"), [("[[A]]", "A"), ("not [[A]] but [[B]]", "B"), ("A", None), ("[[D]]", None), ("", None)]
)
def test_verdicts(reply: str, verdict: str | None) -> None:
    assert verdict_of(reply) == verdict


def test_specs() -> None:
    assert Spec.of("url:org/m@x@http://h:1/v1") == Spec("url", "http://h:1/v1", "org/m@x")
    assert (Spec.of("reward:a/b"), Spec.of("people")) == (Spec("reward", "a/b"), Spec("people"))


# The commands --------------------------------------------------------------------------------------------------------


def line(files: Path, *more: str, policies: tuple[str, ...] = ("base=base", "one=one", "two=two")) -> list[str]:
    named = [
        f"{name}={folder if folder == 'base' else files / folder}"
        for name, _, folder in (p.partition("=") for p in policies)
    ]
    return [
        *(str(files / "model"), "--policy", *named, "--prompts", str(files / "prompts.jsonl")),
        *("--per-prompt", "2", "--max-new-tokens", "5", *more),
    ]


def test_evaluate_by_a_reward_role(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", *line(files, "--judge", f"reward:{files / 'judge'}", "--out", str(tmp_path / "e"))]
    arguments += ["--reward", str(files / "other")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert list(result["policies"]) == ["base", "one", "two"]
    metrics = result["policies"]["one"]["metrics"]
    assert set(metrics) == {
        *("score/judge", "score/other", "kl", "length", "ended", "repetition", "distinct", "perplexity")
    }
    assert all(m["low"] <= m["mean"] <= m["high"] for m in metrics.values())
    assert result["policies"]["base"]["metrics"]["kl"] == {"mean": 0, "low": None, "high": None, "n": 4}
    # The win rate by hand, from the scores that `sample` writes.
    rows = evaluation.sample(
        Cast.checked(str(files / "model"), ["base=base", f"one={files / 'one'}"], [files / "judge"]),
        *(ROWS, tmp_path / "by_hand.jsonl", Sampling(2, 5, shared_seeds=True)),
    )
    score = {row["id"]: row["score"] for row in rows}
    wins = []
    for i in range(4):
        a, b = ([score[f"{i}-{name}-{k}"] for k in range(2)] for name in ("base", "one"))
        wins.append(sum((x > y) + (x == y) / 2 for x, y in zip(a, b, strict=True)) / 2)
    there, back = result["win_rates"]["base"]["one"], result["win_rates"]["one"]["base"]
    assert there["rate"] == pytest.approx(sum(wins) / 4)
    assert there["n"] == back["n"] == 4
    assert there["low"] <= there["rate"] <= there["high"]
    assert back["rate"] == pytest.approx(1 - there["rate"])
    assert set(result["win_rates"]["two"]) == {"base", "one"}
    assert sum(policy["strength"]["mean"] for policy in result["policies"].values()) == pytest.approx(0, abs=1e-6)
    shown = " ".join(capsys.readouterr().out.split())
    assert ("Win rates, judge reward:" in shown and there["sentence"] in shown) or back["sentence"] in shown
    assert "0 (no interval)" in shown
    page = (tmp_path / "e" / "evaluation.html").read_text()
    assert "Bradley-Terry" in page and "0 (no interval)" in page


def test_evaluate_again_samples_nothing(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "e")]
    assert main(["evaluate", *line(files, *out)]) == 0
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["win_rates"] == {}
    before = (tmp_path / "e" / "answers.jsonl").read_bytes()
    monkeypatch.setattr(Cast, "loaded", lambda *_, **__: pytest.fail("loaded"))
    assert main(["evaluate", *line(files, *out, "--judge", "function:tests.unit.test_evaluation.wanted")]) == 0
    assert (tmp_path / "e" / "answers.jsonl").read_bytes() == before
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert "score/wanted" in result["policies"]["one"]["metrics"]
    assert result["win_rates"]["one"]["two"]["n"] == 4


def test_a_function_that_scores_and_judges_is_called_once(files: Path, tmp_path: Path) -> None:
    function = "tests.unit.test_evaluation.wanted"
    more = ["--function", function, "--judge", f"function:{function}", "--reward", str(files / "judge")]
    assert main(["evaluate", *line(files, *more, "--out", str(tmp_path / "e"), policies=("base=base", "one=one"))]) == 0
    result = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    metrics = [policy["metrics"] for policy in result["policies"].values()]
    assert [name for name in metrics[0] if name.startswith("score/")] == ["score/judge", "score/wanted"]
    rows = evaluation.read_rows(tmp_path / "e" / "answers.jsonl")
    hit = {name: row["wanted"] in row["completion"].split() for name, row in rows.items()}
    ahead = [hit[f"{i}-one-{k}"] - hit[f"{i}-base-{k}"] for i in range(4) for k in range(2)]
    assert any(hit.values()) and result["win_rates"]["one"]["base"]["rate"] == 0.5 + sum(ahead) / 16


def asks_for_more(completions: list[str], solution: list[str]) -> list[float]:
    raise AssertionError("called")


@pytest.mark.parametrize(("command", "out"), [("sample", "a.jsonl"), ("evaluate", "e")])
def test_a_function_that_asks_for_a_column_that_is_not_there(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, out: str
) -> None:
    asking = ["--function", "tests.unit.test_evaluation.asks_for_more", "--out", str(tmp_path / out)]
    assert main([command, *line(files, *asking)]) == 1
    assert "asks for 'solution'" in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_a_column_that_some_prompts_lack_is_none_there(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    seen = []

    def needs(completions: list[str], answer: list[str | None]) -> list[float]:
        seen.append(answer)
        return [0.0] * len(completions)

    rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "answer": "w9"}]
    alone = replace(cast, policies={"base": None}, rewards=())
    evaluation.sample(alone, rows, tmp_path / "a.jsonl", Sampling(1, 3), [needs], load=lambda: policies)
    assert seen == [[None, "w9"]]


def test_prompts_are_read_by_the_template_that_the_policy_was_trained_with(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Policies and reward roles; a file that was begun otherwise is not gone on with."""
    folder = shutil.copytree(files / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if loud %} w9 w9{% endif %}"
    tokenizer.save_pretrained(folder)
    prompts = tmp_path / "chat.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "w5 w6"}]}) + "\n", encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "w5 w6 w9 w9"}) + "\n", encoding="utf-8")
    save_reward_adapter(tmp_path / "judge", folder, seed=3)

    def sampled(name: str, file: Path, *more: str) -> int:
        line = [str(folder), "--prompts", str(file), "--reward", str(tmp_path / "judge"), "--per-prompt", "4"]
        return main(["sample", *line, "--max-new-tokens", "3", "--out", str(tmp_path / name), *more])

    loud = ("--chat_template_kwargs", '{"loud": true}')
    assert sampled("loud.jsonl", prompts, *loud) == sampled("quiet.jsonl", prompts) == 0
    assert sampled("plain.jsonl.out", tmp_path / "plain.jsonl") == 0
    said = {
        name: [(row["completion_ids"], row["score"]) for row in evaluation.read_rows(tmp_path / name).values()]
        for name in ("loud.jsonl", "quiet.jsonl", "plain.jsonl.out")
    }
    assert said["loud.jsonl"] == said["plain.jsonl.out"] != said["quiet.jsonl"]
    assert sampled("loud.jsonl", prompts) == 1
    assert "was made with chat_template_kwargs {'loud': True}, and not with None" in capsys.readouterr().err


def test_the_base_is_held_in_the_precision_that_is_asked_for(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, loaded = list[torch.dtype](), Cast.loaded

    def noted(self: Cast, tokenizer: Any, **how: Any) -> Policies:
        policies = loaded(self, tokenizer, **how)
        held.append(policies.model.dtype)
        return policies

    monkeypatch.setattr(Cast, "loaded", noted)
    for command, more in (("sample", []), ("evaluate", ["--per-prompt", "1"])):
        for dtype in ("bfloat16", "float32"):
            out = str(tmp_path / f"{command}-{dtype}{'.jsonl' if command == 'sample' else ''}")
            assert main([command, *line(files, "--dtype", dtype, "--out", out, *more)]) == 0
    assert held == [torch.bfloat16, torch.float32] * 2


def test_a_policy_may_bring_a_pad_token_that_the_model_lacks(files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(files / "one", tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.add_special_tokens({"pad_token": "<pad of its own>"})
    tokenizer.save_pretrained(folder)
    mine = Cast.checked(str(files / "model"), [f"one={folder}"])
    policies = mine.loaded(mine.tokenizer())
    assert policies.tokenizer.pad_token_id >= policies.causal_lm.get_input_embeddings().num_embeddings
    rollout = policies.sample("one", ["w5", "w5 w6 w7"], uniforms([(1,), (2,)], 3))
    assert len(rollout.completions) == 2


def test_columns_that_answers_have_are_left_out_and_said(cast: Cast, policies: Policies, tmp_path: Path) -> None:
    rows = [{**row, "id": f"mine-{i}"} for i, row in enumerate(ROWS)]
    with pytest.warns(UserWarning, match="column 'id' is left out"):
        found = evaluation.sample(cast, rows, tmp_path / "a.jsonl", Sampling(1, 3), load=lambda: policies)
    assert found[0]["id"] == "0-base-0" and found[0]["wanted"] == "w20"


@pytest.mark.parametrize(
    ("family", "words", "new_tokens", "refused"),
    [("gpt2", 4, 60, False), ("gpt2", 4, 61, True), ("llama", 4, 90, False), ("llama", 64, 1, True)],
)
def test_prompts_that_the_model_cannot_read(
    tmp_path: Path, family: str, words: int, new_tokens: int, refused: bool
) -> None:
    cast = Cast.checked(str(save_base(tmp_path / "model", config_of(family))))  # of 64 positions

    def load() -> Policies:
        raise OSError("loaded")

    rows = [{"prompt": "w5"}, {"prompt": " ".join(["w6"] * words)}]
    said = rf"has {words} tokens and {new_tokens} may follow, but the model reads 64" if refused else "loaded"
    with pytest.raises((ValueError, OSError), match=said):
        evaluation.sample(cast, rows, tmp_path / "a.jsonl", Sampling(1, new_tokens), load=load)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "p"}', "Line 2 of '.*' has no 'id': mend it"),
        ("[1]", "Line 2 of '.*' is no row of JSON: mend it"),
        ('{"id": "a", "x": 2}', "Line 2 of '.*' has the id of a line before, 'a': leave one of them"),
    ],
)
def test_a_file_of_answers_that_is_broken(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a", "x": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=sentence):
        evaluation.read_rows(file)
    file.write_text('{"id": "a"}\n{"id": "a"}\n{"id": "b"')
    assert evaluation.read_rows(file) == {"a": {"id": "a"}}


def test_one_policy_is_compared_with_the_base(files: Path, tmp_path: Path) -> None:
    arguments = line(files, "--judge", f"reward:{files / 'judge'}", "--out", str(tmp_path / "e"), policies=("one=one",))
    assert main(["evaluate", *arguments]) == 0
    assert set(json.loads((tmp_path / "e" / "evaluation.json").read_text())["win_rates"]["one"]) == {"base"}


def rated(file: Path, answers: Path, better: Callable[[str, str], float]) -> None:
    """Have somebody judge all pairs on the rating page: 1.0 where the first is better, 0.5 for a tie."""
    with Store.open(file, answers, "pairs") as store:
        while (shown := store.next(store.rater("ann"))) is not None:
            outcome = better(*map(str, shown.completions))
            store.judge("ann", shown.token, "judged", {1.0: (1, 2), 0.5: (1, 1), 0.0: (2, 1)}[outcome])


def test_evaluate_by_a_language_model_beside_people(
    files: Path, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rubric, out, store = tmp_path / "rubric.txt", tmp_path / "e", tmp_path / "people.sqlite"
    rubric.write_text("The longer one is better.")
    more = ["--judge", f"url:m@{server.url}", "--rubric", str(rubric), "--store", str(store), "--out", str(out)]
    arguments = ["evaluate", *line(files, *more, policies=("base=base", "twin=base", "one=one"))]
    assert main(arguments) == 0
    assert json.loads((out / "evaluation.json").read_text())["agreement"] is None
    assert "Nobody has compared these answers" in capsys.readouterr().out
    rated(store, out / "answers.jsonl", lambda a, b: 1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5)
    assert main(arguments) == 0
    result = json.loads((out / "evaluation.json").read_text())
    assert result["judge"] == f"url:m@{server.url}"
    assert result["agreement"]["mean"] == 1
    said = {row["id"]: row["completion"] for row in map(json.loads, (out / "answers.jsonl").read_text().splitlines())}
    with Store.read(store) as kept:
        compared = [(said[c.id_a], said[c.id_b]) for c in kept.comparisons()]
    assert 4 < result["agreement"]["pairs"] == sum(a != b for a, b in compared) < len(compared), "none that read alike"
    assert server.requests[0]["messages"][0]["content"] == "The longer one is better."


def test_people_who_judged_other_answers_of_the_same_ids_are_not_heard(tmp_path: Path) -> None:
    """Ids are alike in every file that is sampled; a policy that was trained on since writes other answers."""
    rows = [
        {"id": f"0-{name}-0", "prompt": "p", "policy": name, "completion": text, "tokens": 2, "completion_ids": [1, 2]}
        for name, text in (("base", "one"), ("ppo", "two"))
    ]
    file, store = tmp_path / "answers.jsonl", tmp_path / "people.sqlite"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rated(store, file, lambda a, b: 1.0)
    assert len(_said_by_people(store, rows)) == 1
    rows[1]["completion"] = "three"
    with pytest.raises(ValueError, match="judgements of other answers: 0-ppo-0 reads otherwise"):
        _said_by_people(store, rows)


def test_people_judge(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "people.sqlite", tmp_path / "e"
    arguments = ["evaluate", *line(files, "--judge", "people", "--store", str(store), "--out", str(out))]
    assert main(arguments) == 1
    assert "No person has compared" in capsys.readouterr().err
    by = {row["completion"]: row["policy"] for row in evaluation.read_rows(out / "answers.jsonl").values()}
    assert len(set(by.values())) == 3
    strength = {"one": 2, "two": 2, "base": 1}  # what this person prefers

    def better(a: str, b: str) -> float:
        return (strength[by[a]] - strength[by[b]] + 1) / 2

    rated(store, out / "answers.jsonl", better)
    assert main(arguments) == 0
    rates = json.loads((out / "evaluation.json").read_text())["win_rates"]
    assert rates["one"]["base"]["rate"] > 0.9 and rates["base"]["one"]["rate"] < 0.1
    assert rates["two"]["one"]["rate"] == 0.5
    # The ids of other answers are the same.
    others = ["--seed", "1", "--judge", "people", "--store", str(store), "--out", str(tmp_path / "others")]
    assert main(["evaluate", *line(files, *others)]) == 1
    assert "holds judgements of other answers" in capsys.readouterr().err


def test_what_users_named_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {name: {"kl": Interval(0.1, 0.0, 0.2, 4)} for name in ("<i>x", "y")}
    said = [Comparison(i, "<i>x", "y", 1.0, 3, 3, "j") for i in range(4)]
    rates = win_rates(said, list(figures))
    settings = {"base": "<b>", "prompts": 4, "per_prompt": 1, "temperature": 1.0}
    result = as_json(settings, dict.fromkeys(figures), figures, "<u>", rates, 0, {}, None)
    page = str(evaluation.section(result))
    assert "&lt;i&gt;x against y" in page and "100.0%" in page
    assert not any(tag in page for tag in ("<i>", "<b>", "<u>"))
    named = {**result, "policies": {"x": {"metrics": {"score/run[/1]": {"mean": 1, "low": 0, "high": 2, "n": 4}}}}}
    evaluation.print_result({**named, "judge": None})
    assert "score/run[/1]" in capsys.readouterr().out


def test_sample_picks(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = ["--reward", str(files / "judge"), str(files / "other")]
    picking = ["--pick", "disagreement", "--items", "3", "--out", str(tmp_path / "a.jsonl")]
    assert main(["sample", *line(files, *rewards, *picking)]) == 0
    rows = list(evaluation.read_rows(tmp_path / "a.jsonl").values())
    assert [row["item"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert len(evaluation.read_rows(tmp_path / "a.all.jsonl")) == 4 * 2 * 3
    capsys.readouterr()
    assert main(["sample", *line(files, *rewards, *picking), "--items", "1000"]) == 0  # the same answers, chosen anew
    found = len(evaluation.read_rows(tmp_path / "a.jsonl")) // 2
    assert f"There are {found} pairs to pick, not 1,000." in capsys.readouterr().out


def test_what_is_left_out_of_the_prompts_is_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "twice.jsonl"
    prompts.write_text((files / "prompts.jsonl").read_text() * 2)
    assert main(["sample", *line(files, "--prompts", str(prompts), "--out", str(tmp_path / "a.jsonl"))]) == 0
    assert f"{prompts}: 4 rows left out, whose prompt was there before\n" in capsys.readouterr().out


def test_a_pick_overwrites_nothing_else(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(files / "prompts.jsonl", prompts)
    assert main(["sample", *line(files, "--pick", "random", "--items", "1", "--out", str(prompts))]) == 1
    assert "exists already" in capsys.readouterr().err
    assert prompts.read_bytes() == (files / "prompts.jsonl").read_bytes()


def test_a_pick_that_there_is_not() -> None:
    rows = [scored("p", 0, x=1.0), scored("p", 1, x=2.0)]
    unscored = [{**row, "scores": {"x": None}} for row in rows]
    for these, way, of in (([], "random", "pairs"), (rows[:1], "random", "pairs"), (unscored, "closeness", "pairs")):
        with pytest.raises(ValueError, match="There are no pairs to pick"):
            evaluation.pick(these, way, 1, of)
    for way, of in (("disagrement", "pairs"), ("random", "answer")):
        with pytest.raises(ValueError, match="cannot be picked"):
            evaluation.pick(rows, way, 1, of)


BAD: list[tuple[list[str], str]] = [
    (["--policy", "x=missing"], "The policy role's folder 'missing' does not exist"),
    (["--policy", "x=one", "x=two"], "Two policies are called 'x'"),
    (["--policy", "one"], "must be NAME=FOLDER"),
    (["--policy", "x=foreign"], "was trained over"),
    (["--policy", "x=judge"], "The adapter in"),
    (["--reward", "one"], "no score head"),
    (["--judge", "oracle"], "must be reward:FOLDER"),
    (["--judge", "url:model"], "must be url:MODEL@URL"),
    (["--judge", "url:model@ftp://x"], "must be url:MODEL@URL"),
    (["--judge", "reward:missing", "--policy", "x=one"], "The reward role's folder 'missing' does not exist"),
    (["--judge", "function:no.such"], "cannot be imported"),
    (["--judge", "people", "--policy", "x=one"], "Give --store FILE"),
    (["--judge", "reward:judge"], "the bare base is alone"),
    (["--judge", "url:m@http://127.0.0.1:9", "--policy", "x=one", "--judge-key", "NO_SUCH_VARIABLE"], "is not set"),
    (["--rubric", "missing.txt", "--policy", "x=one", "--judge", "url:m@http://127.0.0.1:9"], "missing.txt"),
    (["--rubric", "rubric.txt"], "give --judge url:MODEL@URL"),
    (["--judge-key", "HOME", "--judge", "reward:judge", "--policy", "x=one"], "give --judge url:MODEL@URL"),
    (["--store", "people.sqlite"], "give --judge people"),
    (["--prompts", "missing.jsonl"], "does not exist"),
    (["--prompts", "empty.jsonl"], "empty.jsonl"),
    (["--per-prompt", "0"], "per_prompt is 0"),
    (["--temperature", "-1"], "temperature is -1"),
]


@pytest.mark.parametrize(("more", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_said_before_a_model_is_loaded(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "judge"):
        (tmp_path / name).symlink_to(files / name)
    shutil.copytree(files / "one", tmp_path / "foreign")
    config = tmp_path / "foreign" / adapters.CONFIG
    config.write_text(config.read_text().replace(str(files / "model"), "other/model"))
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.setattr("trl_ext.roles.assembly.load_base", lambda *_, **__: pytest.fail("loaded"))
    arguments = [str(files / "model"), "--prompts", str(files / "prompts.jsonl"), "--out", str(tmp_path / "e"), *more]
    assert main(["evaluate", *arguments]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--pick", "disagreement", "--items", "3"], "give two or more"),
        (["--pick", "closeness", "--items", "3"], "give --reward or --function"),
        (["--pick", "random"], "give --items N"),
        (["--items", "3"], "give --pick WAY"),
        (["--of", "pairs"], "give --pick WAY"),
        (["--pick", "closeness", "--of", "answers", "--items", "3"], "leave out --of answers"),
    ],
)
def test_bad_picks(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert main(["sample", *line(files, "--out", str(tmp_path / "a.jsonl")), *more]) == 1
    assert sentence in capsys.readouterr().err


def test_no_such_folder_to_write_to(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *line(files, "--out", str(tmp_path / "no" / "a.jsonl"))]) == 1
    assert "does not exist: make it" in capsys.readouterr().err
