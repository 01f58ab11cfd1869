"""PPO, its evaluations and `trl-ext sample` over vLLM servers: stand-ins with a true model behind them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import move_policy, prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with, trained_state
from tests.vllm_server import StandIn
from trl_ext import PPOTrainer, SharedBase, cli
from trl_ext.generation import GenerationError


def trainer_for(tmp_path: Path, server: StandIn, **changes: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "vllm_server_timeout": 1.0,
        "vllm_probe_tolerance": 0.02,
        **changes,
    }
    data, model = prompt_dataset(32), saved_model(tmp_path / "model")
    args = config(tmp_path / "out", **settings)
    return PPOTrainer(model, cats, args, data, data.select(range(5)), word_tokenizer(), peft_config=LORA)


def test_a_run_over_a_server(tmp_path: Path, server: StandIn) -> None:
    """Each rollout is answered by the policy as it is then, so that the importance weights, which are on, are 1."""
    trainer = trainer_for(tmp_path, server, total_episodes=32, temperature=0.8)
    loads = len(server.loads)
    trainer.train()
    rows = rows_with(trainer, "objective/scores")
    assert len(rows) == 4
    for row in rows:
        assert row["val/sampling_kl"] == pytest.approx(0.0, abs=1e-4)
        for name in ("mean", "min", "max"):
            assert row[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1.0, abs=1e-3)
    assert len(set(server.loads[loads:])) == len(rows), "a new adapter each rollout"
    assert max(abs(row["objective/kl"]) for row in rows[1:]) > 1e-3, "and not that of the beginning"
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_objective/scores"] == again["eval_objective/scores"]
    assert len(server.loads) - loads == len(rows) + 1 and len(server.adapters) == 1


def test_a_run_that_resumes_draws_the_same_completions(tmp_path: Path, server: StandIn) -> None:
    settings = {"total_episodes": 32, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(tmp_path, server, **settings)
    whole.train()
    resumed = trainer_for(tmp_path, server, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    expected = trained_state(whole)
    for name, tensor in trained_state(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_server_that_goes_for_good_loses_nothing(tmp_path: Path, server: StandIn) -> None:
    trainer = trainer_for(tmp_path, server, total_episodes=48)
    server.die_after = len(server.asked) + 8 + 3  # in the second rollout
    message = (
        r"^No vLLM server answers any more at .*: start one again\. All 2 steps before are saved in .*checkpoint-2'"
    )
    with pytest.raises(GenerationError, match=message):
        trainer.train()
    server.start()
    again = trainer_for(tmp_path, server, total_episodes=48)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12


def test_raw_log_probs_are_refused_where_they_do_not_say_what_sampled(tmp_path: Path, server: StandIn) -> None:
    server.processed = False
    with pytest.raises(ValueError, match=r"^The vLLM server tells raw log-probabilities, .*--logprobs-mode proc"):
        trainer_for(tmp_path, server, temperature=0.7)
    trainer_for(tmp_path, server)
    trainer_for(tmp_path, server, temperature=0.7, vllm_importance_sampling_correction=False)


@pytest.mark.parametrize(("mode", "error"), [("server", ConnectionError), ("colocate", ImportError)])
def test_an_engine_that_is_not_there_is_missed_before_a_model_is_loaded(
    mode: str, error: type[Exception], tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    monkeypatch.setattr("trl_ext.ppo.checks.find_spec", lambda name: None)
    monkeypatch.setattr("trl_ext.ppo.trainer.build_base", lambda *_: pytest.fail("a model is loaded"))
    url = server.url if mode == "server" else None
    with pytest.raises(error, match=r"No vLLM server is up at|vLLM is not installed"):
        trainer_for(
            tmp_path, server, vllm_mode=mode, vllm_server_base_url=url, vllm_server_timeout=0.2 if url else 240.0
        )


def test_sample(tmp_path: Path, server: StandIn) -> None:
    """Under the saved policy and the bare base, with what is computed here beside it."""
    model = saved_model(tmp_path / "model")
    move_policy(SharedBase.from_pretrained(model, policy=LORA)).save_pretrained(tmp_path / "saved")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat", "a", "the dog")))
    ask = ["sample", model, "--policy", f"mine={tmp_path / 'saved' / 'policy'}", "bare=base", "--prompts", str(prompts)]
    ask += ["--max-new-tokens", "5", "--temperature", "0", "--out"]
    assert cli.main([*ask, str(tmp_path / "here.jsonl")]) == 0
    assert cli.main([*ask, str(tmp_path / "there.jsonl"), "--vllm_server_base_url", server.url]) == 0
    here, there = (read(tmp_path / f"{name}.jsonl") for name in ("here", "there"))
    assert here == there and len(here) == 6
    assert len({str(row["completion_ids"]) for row in here if row["prompt"] == "a"}) == 2, "the policies differ"
    assert server.adapters == {} and (tmp_path / "saved" / "policy" / "adapter_config.json").is_file()
    drawn = [*ask[: ask.index("--temperature")], "--per-prompt", "3", "--out"]
    for name in ("one", "two"):
        assert cli.main([*drawn, str(tmp_path / f"{name}.jsonl"), "--vllm_server_base_url", server.url]) == 0
    assert read(tmp_path / "one.jsonl") == read(tmp_path / "two.jsonl")
    assert len({row["completion"] for row in read(tmp_path / "one.jsonl")}) > 6


def read(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()} for row in rows]
