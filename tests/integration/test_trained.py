"""What is done with saved adapters: merged, scored with, talked to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from tests.helpers import CHAT_TEMPLATE, saved_model, word_tokenizer
from tests.parity import tiny
from tests.zoo import configs
from trl_ext import SharedBase
from trl_ext.cli import main
from trl_ext.evaluation import Cast
from trl_ext.launch import trained

CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def home(tmp_path: Path) -> tiny.Home:
    return tiny.build(tmp_path / "home", tiny.config_of("llama"))


@torch.no_grad()
def test_merged_policy_and_reward_model(home: tiny.Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, out = str(home.saved / "policy"), str(tmp_path / "merged")
    assert main(["merge", str(home.base_folder), "--policy", policy, "--out", out]) == 0
    assert "from the adapter on its base" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    alone = AutoPeftModelForCausalLM.from_pretrained(home.saved / "policy")
    base = AutoModelForCausalLM.from_pretrained(home.base_folder)
    torch.testing.assert_close(merged(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (base(IDS).logits - alone(IDS).logits).abs().max() > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()

    reward = tiny.save_reward_adapter(tmp_path / "reward", Path(home.base_folder), seed=3)
    assert main(["merge", "--policy", str(reward), "--out", str(tmp_path / "judge")]) == 0
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    expected = tiny.load_classifier(reward, Path(home.base_folder))(IDS).logits
    torch.testing.assert_close(judge(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_model_over_a_base_without_a_pad_token(home: tiny.Home, tmp_path: Path) -> None:
    """As the config of many bases is; a classifier scores several answers at a time all the same."""
    base = Path(shutil.copytree(home.base_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    reward = tiny.save_reward_adapter(tmp_path / "reward", base, seed=3)
    trained.merge(reward, tmp_path / "judge", str(base))
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert judge(IDS.repeat(2, 1)).logits.shape == (2 * len(IDS), 1)


def test_a_token_that_the_model_lacks_stays_behind(home: tiny.Home, tmp_path: Path) -> None:
    """A pad token that somebody added, say: llama.cpp's converter refuses ids beyond the embeddings."""
    tokenizer = tiny.make_tokenizer()
    vocabulary, tokenizer.chat_template = len(tokenizer), CHAT_TEMPLATE
    tokenizer.add_special_tokens({"pad_token": "[ADDED]"})
    assert len(tokenizer) > AutoModelForCausalLM.from_pretrained(home.base_folder).config.vocab_size
    tokenizer.save_pretrained(home.saved / "policy")
    with pytest.warns(UserWarning, match=r"has '\[ADDED\]' and the model has \d+ ids only"):
        trained.merge(home.saved / "policy", tmp_path / "merged")
    written = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(written) == vocabulary and written.chat_template == CHAT_TEMPLATE


def test_a_merge_that_gives_another_function_is_refused(tmp_path: Path) -> None:
    """Zamba2's layers share their weights, and PEFT adds what each adapter holds to all of them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configs.config_of("zamba2")).save_pretrained(tmp_path / "zamba2")
    word_tokenizer().save_pretrained(tmp_path / "zamba2")
    base = SharedBase.from_pretrained(str(tmp_path / "zamba2"))
    tiny.randomise(base, seed=3, only=".policy.", scale=0.2)
    base.save_pretrained(tmp_path / "roles")
    with pytest.raises(ValueError, match="another function"):
        trained.merge(tmp_path / "roles" / "policy", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_score_a_file(home: tiny.Home, tmp_path: Path) -> None:
    reward = tiny.save_reward_adapter(tmp_path / "reward", Path(home.base_folder), seed=3)
    rows = [{"prompt": "w5 w6", "text": " w7", "by": "a"}, {"prompt": "w8", "text": " w9 w10 w11", "by": "b"}]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "scores.jsonl"
    assert (
        main(["score", str(reward), str(tmp_path / "answers.jsonl"), "--out", str(out), "--column", "text=completion"])
        == 0
    )
    scored = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["by"] for row in scored] == ["a", "b"]
    classifier, tokenizer = tiny.load_classifier(reward, Path(home.base_folder)), tiny.make_tokenizer()
    for row, given in zip(scored, rows, strict=True):
        ids = torch.tensor([tokenizer(given["prompt"] + given["text"] + tokenizer.eos_token)["input_ids"]])
        assert row["score"] == pytest.approx(float(classifier(ids).logits), abs=1e-5)


def test_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved_model(tmp_path / "model")
    word_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    said = iter(["the cat", "/new", "the dog", "sat", ""])
    messages = trained.chat(tmp_path / "adapter", lambda: next(said), max_new_tokens=3)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages if m["role"] == "user"] == ["the dog", "sat"]
    capsys.readouterr()
    answers = iter(["the cat"])

    def once(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", once)
    assert main(["chat", str(tmp_path / "adapter"), "--max_new_tokens", "3"]) == 0


def test_chat_is_by_the_template_that_the_policy_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_model(tmp_path / "model")
    tokenizer = word_tokenizer("{% if loud %}big {% endif %}{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(tmp_path / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    asked, generate = [], LlamaForCausalLM.generate

    def noted(self: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["input_ids"][0].tolist())
        return generate(self, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    for more, text in (([], "the cat"), (["--chat_template_kwargs", '{"loud": true}'], "big the cat")):
        said = iter(["the cat", ""])
        monkeypatch.setattr("builtins.input", lambda _, said=said: next(said))
        assert main(["chat", str(tmp_path / "adapter"), "--max_new_tokens", "2", *more]) == 0
        assert asked[-1] == tokenizer(text)["input_ids"]


def test_answers_end_where_they_did_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the EOS of the tokenizer that the policy was saved with, though the base's generation config has another."""
    base = saved_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = 12
    model.save_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    word_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "adapter")
    ends, generate = [], LlamaForCausalLM.generate

    def noted(self: Any, **kwargs: Any) -> Any:
        ends.append(sorted(kwargs["eos_token_id"]))
        return generate(self, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    said = iter(["the cat", ""])
    trained.chat(tmp_path / "adapter", lambda: next(said), max_new_tokens=2)
    trained.merge(tmp_path / "adapter", tmp_path / "merged")
    ends.append(sorted(GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id))
    assert ends == [[1, 12], [1, 12]]
    cast = Cast.checked(base, [f"p={tmp_path / 'adapter'}", "base=base"])
    assert cast.tokenizer().chat_template == CHAT_TEMPLATE, "prompts are written as in training, too"


def test_score_reads_tools_and_template_arguments_as_the_training_does(home: tiny.Home, tmp_path: Path) -> None:
    adapter = tiny.save_reward_adapter(tmp_path / "judge", home.base_folder, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(home.base_folder)
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% if loud %}w9 {% endif %}" + CONTENTS
    tokenizer.save_pretrained(adapter)
    answer = [{"role": "assistant", "content": "w5"}]
    given = [{}, {"tools": [{"name": "w7"}]}, {"tools": '[{"name": "w7"}]', "chat_template_kwargs": {"loud": True}}]
    rows = [{"completion": answer, "tools": None, "chat_template_kwargs": None, **more} for more in given]
    scores = [trained.score(adapter, Dataset.from_list([row]), str(home.base_folder))[0] for row in rows]
    plain = ["w5", "w7 w5", "w7 w9 w5"]
    by_hand = SharedBase.from_pretrained(str(home.base_folder), reward=adapter).eval()
    for score, text in zip(scores, plain, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert score == pytest.approx(float(by_hand.scores(ids, torch.ones_like(ids))), rel=1e-4)
    with pytest.raises(ValueError, match=r"^Row 0, column 'tools': 7 is no list"):
        trained.score(adapter, Dataset.from_list([{"completion": answer, "tools": 7}]), str(home.base_folder))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["merge", "{model}", "--policy", "{model}", "--out", "{new}"], "holds no adapter_config.json"),
        (["merge", "--policy", "{adapter}", "--out", "{model}"], "is not empty"),
        (["score", "{adapter}", "{rows}", "--out", "{new}"], "no column 'completion'"),
        (["score", "{adapter}", "{rows}", "--out", "nowhere/new"], "does not exist: make it"),
        (["chat", "nowhere"], "holds no adapter_config.json"),
        (["chat", "{judge}"], "gives scores and writes no text"),
    ],
)
def test_bad_calls(
    arguments: list[str], sentence: str, home: tiny.Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"answer": "w5"}\n', encoding="utf-8")
    places = {"model": home.base_folder, "adapter": home.saved / "policy", "judge": home.saved / "value"}
    places |= {"new": tmp_path / "new", "rows": tmp_path / "rows.jsonl"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    assert sentence in capsys.readouterr().err
