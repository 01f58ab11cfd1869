"""Real training runs of PPOTrainer on a tiny model."""

import asyncio
import copy
import json
import random
import shutil
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from tests.helpers import (
    CHAT_TEMPLATE,
    DEVICE,
    QUIET,
    prompt_dataset,
    saved_model,
    tiny_classifier,
    tiny_llama,
    word_tokenizer,
)
from tests.parity.tiny import save_reward_adapter
from tests.zoo import configs as zoo
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase
from trl_ext.ppo import checkpoints
from trl_ext.ppo.batches import mini_batch
from trl_ext.ppo.building import default_config
from trl_ext.rewards import RewardError

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

# A GPU has another kernel for every shape of a product. Gradients of nearly 0 differ by more of themselves then, and
# AdamW, which divides by a gradient's size, makes steps of that.
ROUNDING = 1 if DEVICE.type == "cpu" else 20

TRL_NAMES = [
    "objective/kl",
    "objective/scores",
    "objective/entropy",
    "objective/rlhf_reward",
    "objective/non_score_reward",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/num_eos_tokens",
    "episode",
    "eps",
]


def cats(completions: list[str], **_: Any) -> list[float]:
    """How often an answer says cat."""
    return [float(text.split().count("cat")) for text in completions]


def config(output_dir: Path, **changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "total_episodes": 16,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **QUIET,
    }
    return PPOConfig(**{**settings, **changes})


def trainer_for(tmp_path: Path, reward: Any = cats, rows: int = 32, model: Any = None, **changes: Any) -> PPOTrainer:
    model = model if model is not None else saved_model(tmp_path / "model")
    lora = LORA if isinstance(model, str) else None
    data = prompt_dataset(rows)
    return PPOTrainer(
        model,
        reward,
        config(tmp_path / "out", **changes),
        data,
        data.select(range(5)),
        word_tokenizer(),
        peft_config=lora,
    )


def test_the_prompts_are_ordered_by_a_seed_of_their_own(tmp_path: Path) -> None:
    orders = [
        list(trainer_for(tmp_path, seed=seed, data_seed=of_data)._get_train_sampler())
        for seed, of_data in ((1, None), (2, 1), (1, 2))
    ]
    assert orders[0] == orders[1] != orders[2]


def trained_state(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.base.named_parameters() if p.requires_grad}


def said_by(base: SharedBase, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and values of a row of `ids` after its first, on the CPU, wherever the base lies."""
    row = torch.tensor([ids], device=base.device)
    every = torch.ones_like(row)
    return base.logprobs(row, every, len(ids) - 1).cpu(), base.values(row, every, len(ids) - 1).cpu()


def rows_with(trainer: PPOTrainer, name: str) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if name in row]


def test_a_run_learns_what_is_rewarded_and_logs_trls_names(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, total_episodes=30 * 32, per_device_train_batch_size=32, kl_coef=0.01)
    trainer.train()
    logs = rows_with(trainer, "objective/scores")
    assert len(logs) == 30, "one row a rollout"
    first, last = (sum(row["objective/scores"] for row in part) / 5 for part in (logs[:5], logs[-5:]))
    assert last > first + 0.8
    assert logs[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert logs[-1]["objective/kl"] > 0.1
    assert not [name for name in TRL_NAMES if name not in logs[0]]
    assert logs[-1]["episode"] == 30 * 32


@pytest.mark.long
@pytest.mark.skipif(
    DEVICE.type != "cpu" and not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="Triton, which compiles for a GPU, needs a C compiler",
)
def test_compiled_training_takes_the_same_steps(tmp_path: Path) -> None:
    states, logs = [], []
    for compiled in (False, True):
        trainer = trainer_for(tmp_path / str(compiled), total_episodes=8, torch_compile=compiled)
        before = trained_state(trainer)
        trainer.train()
        logs.append(rows_with(trainer, "loss")[0])
        states.append({name: tensor - before[name] for name, tensor in trained_state(trainer).items()})
    for name, moved in states[0].items():
        if DEVICE.type == "cpu":
            torch.testing.assert_close(states[1][name], moved, rtol=1e-3, atol=1e-4)
        else:  # Adam turns the rounding of a gradient near 0 into a step of its own: single numbers say little there
            assert (states[1][name] - moved).norm() <= 0.05 * moved.norm(), name
    assert states[0]["model.base_model.model.model.layers.0.self_attn.q_proj.lora_B.value.weight"].norm() > 1e-3
    for name in ("loss", "grad_norm/policy", "grad_norm/value", "objective/kl", "policy/approxkl_avg"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3, abs=1e-6 * ROUNDING)


def test_steps_count_optimizer_steps_and_total_episodes_counts_answers(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, total_episodes=40, num_mini_batches=2, num_ppo_epochs=3)
    trainer.train()
    # 16 answers a rollout; 40 need three rollouts of 3 x 2 steps.
    assert trainer.state.global_step == 3 * 6
    assert [row["step"] for row in rows_with(trainer, "objective/kl")] == [6, 12, 18]


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path, value: str) -> None:
    states = []
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / str(rows)
        base = SharedBase.from_pretrained(saved_model(folder / "model"), policy=LORA, value=value)
        with torch.no_grad():  # from_pretrained drew the adapters: make them the same each time
            generator = torch.Generator().manual_seed(1)
            for parameter in base.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        trainer = trainer_for(folder, model=base, num_mini_batches=2, **changes)
        trainer.train()
        states.append(trained_state(trainer))
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5 * ROUNDING)


@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_resuming_in_the_middle_of_a_rollout_ends_where_an_unbroken_run_ends(batching: str, tmp_path: Path) -> None:
    settings = {"total_episodes": 48, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 3}
    settings["use_transformers_continuous_batching"] = batching == "continuous"
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / "rollout.safetensors").is_file()
    resumed = trainer_for(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 12
    expected = trained_state(whole)
    for name, tensor in trained_state(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    same = ("loss", "objective/scores", "objective/kl", "policy/approxkl_avg", "loss/value_avg")
    for row, other in zip(rows_with(whole, "objective/kl")[1:], rows_with(resumed, "objective/kl")[-2:], strict=True):
        assert {key: row[key] for key in same} == {key: other[key] for key in same}


def test_a_checkpoint_by_which_steps_would_count_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    """Whose rollouts are of another size, or which holds weights alone."""
    settings = {"total_episodes": 32, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 3}
    trainer_for(tmp_path, **settings).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    for changes, why in (
        (
            {"per_device_train_batch_size": 4},
            r"with rollout_batch_size 16, and this one's is 8.* so that it stays 16\.",
        ),
        ({"num_ppo_epochs": 3}, r"with steps_per_rollout 4, and this one's is 6.*: choose num_ppo_epochs and"),
    ):
        with pytest.raises(ValueError, match=why):
            trainer_for(tmp_path / "other", **{**settings, **changes}).train(resume_from_checkpoint=checkpoint)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    resumed = trainer_for(tmp_path / "split", **settings, **split)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 8, "as many in smaller parts are the same rollouts"


def test_weights_alone_are_not_gone_on_with_and_what_fails_is_saved_whole(tmp_path: Path) -> None:
    settings = {"total_episodes": 32, "save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    trainer_for(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="holds weights alone, as save_only_model has it"):
        trainer_for(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    calls = []

    def breaks(completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("gone")
        return [1.0] * len(completions)

    trainer = trainer_for(tmp_path / "broken", reward=breaks, evidence=False, **settings)
    with pytest.raises(RewardError, match="All 6 steps before are saved"):
        trainer.train()
    resumed = trainer_for(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "out" / "checkpoint-6"))
    assert resumed.state.global_step == 8 and trainer.args.save_only_model


def test_what_was_being_written_when_a_run_was_killed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"total_episodes": 48, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_for(tmp_path, **settings)

    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        if trainer.state.global_step == 6:
            raise Killed

    monkeypatch.setattr(checkpoints, "save_experience", killed)
    with pytest.raises(Killed):
        trainer.train()
    out = tmp_path / "out"
    assert [path.name for path in out.glob("**/checkpoint-*")] == ["checkpoint-3", "checkpoint-6"]
    assert get_last_checkpoint(str(out)) == str(out / "checkpoint-3")
    monkeypatch.undo()
    resumed = trainer_for(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert get_last_checkpoint(str(out)) == str(out / "checkpoint-12")
    assert not (out / "unfinished").exists()


def test_a_run_that_was_killed_after_its_last_step_is_not_trained_further(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    resumed = trainer_for(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 4
    expected = trained_state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_state(resumed).items())
    assert len(rows_with(resumed, "loss")) == len(rows_with(whole, "loss"))


def test_old_checkpoints_go_and_the_best_one_stays_and_is_loaded(tmp_path: Path) -> None:
    def judge(completions: list[str], prompts: list[str], trainer_state: Any, **_: Any) -> list[float]:
        """Evaluations, of five prompts, only get worse."""
        return [-float(trainer_state.global_step)] * 5 if len(prompts) == 5 else cats(completions)

    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "objective/scores"}
    kept_of = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, judge, total_episodes=96, num_mini_batches=2, **evaluation, **kept_of)
    trainer.train()
    best, last = (tmp_path / "out" / f"checkpoint-{step}" for step in (3, 24))
    assert set((tmp_path / "out").glob("**/checkpoint-*")) == {best, last}
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == str(best)
    of_best, of_last, loaded = (
        torch.cat(said_by(base, [5, 6, 7, 8, 9]))
        for base in (
            *(
                SharedBase.from_pretrained(str(tmp_path / "model"), policy=folder, value=folder / "value")
                for folder in (best, last)
            ),
            trainer.base,
        )
    )
    # What was loaded from disk lies on the CPU: a GPU beside it sums in another order.
    torch.testing.assert_close(loaded, of_best, rtol=1e-5, atol=1e-6 if DEVICE.type == "cpu" else 1e-5)
    assert bool(((of_last - of_best).abs().amax(dim=1) > 1e-3).all()), "policy and value have moved since"


def test_save_model_writes_a_plain_policy_adapter_with_the_value_role_beside_it(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    plain = AutoPeftModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    logprobs, values = said_by(trainer.base, ids[0].tolist())
    torch.testing.assert_close(logprobs[0], expected, rtol=1e-5, atol=1e-5)
    again = SharedBase.from_pretrained(str(tmp_path / "model"), policy=out, value=out / "value")
    torch.testing.assert_close(said_by(again, ids[0].tolist())[1], values)
    assert float(values.abs().sum()) > 0
    assert json.loads((out / "ppo_config.json").read_text())["num_ppo_epochs"] == 2


def test_a_base_in_4_bits_by_name_and_several_sets_to_evaluate_on(tmp_path: Path) -> None:
    """The first example of the README."""
    data = prompt_dataset(16)
    trainer = PPOTrainer(
        saved_model(tmp_path / "model"),
        cats,
        config(tmp_path / "out"),
        data,
        {"easy": data.select(range(3)), "hard": data.select(range(5))},
        word_tokenizer(),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32"
        ),
        peft_config=LORA,
    )
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in trainer.base.modules()) == 2 * 7
    before = trained_state(trainer)
    trainer.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trained_state(trainer).items() if "B" in name)
    found = trainer.evaluate()
    assert {"eval_easy_objective/scores", "eval_hard_objective/scores"} <= set(found)


def test_an_optimizer_and_a_schedule_of_the_user_s(tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    parameters = [p for role in ("policy", "value") for p in base.trainable_parameters(role)]
    plain = torch.optim.SGD(parameters, lr=0.5)
    halving = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 0.5**step)
    args, data = config(tmp_path / "out", logging_steps=1), prompt_dataset(16)
    trainer = PPOTrainer(base, cats, args, data, processing_class=word_tokenizer(), optimizers=(plain, halving))
    before = trained_state(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer is plain
    assert [row["learning_rate"] for row in rows_with(trainer, "loss")] == [0.5, 0.25, 0.125, 0.0625]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained_state(trainer).items())


def test_settings_of_a_trainer_that_was_given_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_config("org/model/").output_dir == "model-PPO"
    assert default_config(tiny_llama()).output_dir == "model-PPO", "a model without a name"


def test_answers_are_sampled_as_configured(tmp_path: Path) -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.05, "repetition_penalty": 1.2}
    used = trainer_for(tmp_path, generation_kwargs={"no_repeat_ngram_size": 2}, **given).collector.generation_config
    assert {name: getattr(used, name) for name in given} == given
    assert (used.do_sample, used.max_new_tokens, used.no_repeat_ngram_size) == (True, 6, 2)
    assert (used.eos_token_id, used.pad_token_id) == ([1], 0)


def test_reward_functions_get_columns_may_be_async_abstain_and_are_weighted(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def sync(
        prompts: list[Any], completions: list[Any], completion_ids: list[Any], animal: list[str], **rest: Any
    ) -> Any:
        seen.update(rest, prompts=prompts, animal=animal, ids=completion_ids)
        rest["log_metric"]("mine", 3.0)
        rest["log_extra"]("twice", [2 * len(text) for text in completions])
        return [1.0] * len(completions)

    async def later(completions: list[Any], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if i == 0 else 10.0 for i in range(len(completions))]

    trainer = trainer_for(
        tmp_path, [sync, later], total_episodes=8, reward_weights=[1.0, 0.5], log_completions=True, logging_steps=1
    )
    trainer.train()
    row = rows_with(trainer, "objective/scores")[0]
    assert row["objective/scores"] == pytest.approx((1.0 + 7 * 6.0) / 8)
    assert row["rewards/later/mean"] == pytest.approx(10.0)
    assert row["mine"] == pytest.approx(3.0)
    assert seen["trainer_state"] is not None
    assert len(seen["animal"]) == len(seen["ids"]) == 8
    assert len({*map(str, seen["prompts"])}) > 1
    assert len(rows_with(trainer, "loss")) == 2, "each step was logged, the rollout shown once"
    (table,) = (tmp_path / "out" / "completions").iterdir()
    frame = pd.read_parquet(table)
    assert table.name == "completions_00001.parquet"
    assert frame["twice"].tolist() == [2 * len(text) for text in frame["completion"]]
    assert frame["reward/later"].isna().sum() == 1
    assert {"step", "prompt", "completion", "score", "kl", "tokens", "ended"} <= set(frame.columns)


def test_rows_without_any_score_are_counted_and_not_trained_on(tmp_path: Path) -> None:
    """One minibatch of two has no score at all, and moves nothing."""
    scored_rows = mini_batch(8, 0, 2, 42, 0, 0).tolist()

    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if row in scored_rows else None for row in range(len(completions))]

    trainer = trainer_for(
        tmp_path, some, total_episodes=8, per_device_train_batch_size=4, num_mini_batches=2, num_ppo_epochs=1, seed=42
    )
    torch.nn.init.normal_(trainer.base.heads["value"].weight)  # values other than 0, which training on 0 would move
    norms: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients = [p.grad.abs().sum() for p in trainer.base.parameters() if p.grad is not None]
            norms.append(float(sum(gradients)))

    trainer.add_callback(Watch())
    trainer.train()
    assert rows_with(trainer, "objective/unscored")[0]["objective/unscored"] == 4
    assert norms[0] > 0 and norms[1] == 0.0


def test_a_sequence_classifier_scores_answers(tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    tiny_classifier().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    trainer = trainer_for(tmp_path, str(folder), total_episodes=8)
    trainer.train()
    row = rows_with(trainer, "rewards/classifier/mean")[0]
    assert row["rewards/classifier/std"] > 0
    assert row["objective/scores"] == pytest.approx(row["rewards/classifier/mean"], rel=1e-5)


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    saved_model(tmp_path / "model")
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    data = prompt_dataset(8, chat=True)
    args = config(tmp_path / "out", total_episodes=8)
    trainer = PPOTrainer(str(tmp_path / "model"), reward, args, data, processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert trainer.experience is not None
    ids = trainer.experience.rollout.prompt_ids[trainer.experience.rollout.prompt_mask]
    assert int(ids[0]) == 3, "the template's turn start comes first"


@pytest.mark.parametrize("chat", [True, False], ids=["conversations", "texts"])
def test_the_reward_role_reads_answers_as_reward_models_are_trained(chat: bool, tmp_path: Path) -> None:
    """TRL's RewardTrainer ends a text with its EOS, and a conversation with what its template writes after that."""
    model = Path(saved_model(tmp_path / "model"))
    base = SharedBase.from_pretrained(
        str(model), policy=LORA, reward=save_reward_adapter(tmp_path / "reward", model, 3)
    )
    tokenizer, data = word_tokenizer(CHAT_TEMPLATE), prompt_dataset(32, chat)
    args = config(tmp_path / "out", per_device_train_batch_size=32, total_episodes=32, max_completion_length=24)
    trainer = PPOTrainer(base, None, args, data, processing_class=tokenizer)
    trainer.train()
    assert trainer.experience is not None
    rollout, ended = trainer.experience.rollout, 0
    for row, (ids, mask) in enumerate(zip(rollout.input_ids, rollout.attention_mask, strict=True)):
        read = ids[mask.bool()].tolist() + ([4] if chat and rollout.has_eos[row] else [])
        alone = torch.tensor([read], device=base.device)
        expected = base.scores(alone, torch.ones_like(alone)).item()
        assert float(trainer.experience.scores.total[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        ended += int(rollout.has_eos[row])
    assert ended, "some answers end"


def test_evaluation_reports_every_prompt_once_and_leaves_training_untouched(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Watch(RolloutCallback):
        def on_evaluation_end(self, args: Any, state: Any, control: Any, experience: Any, metrics: Any) -> None:
            asked.append(experience.rollout.prompts)

    runs = {}
    for name, changes in (("with", {"eval_strategy": "steps", "eval_steps": 2}), ("without", {})):
        trainer = trainer_for(tmp_path / name, per_device_eval_batch_size=2, **changes)
        trainer.add_callback(Watch())
        trainer.train()
        runs[name] = trainer
    rows = rows_with(runs["with"], "eval_objective/scores")
    assert [row["step"] for row in rows] == [2, 4]
    wanted = {"eval_objective/kl", "eval_completions/mean_length", "eval_completions/eos_rate"}
    assert wanted <= set(rows[0])
    expected = trained_state(runs["without"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_state(runs["with"]).items())
    again = [runs["with"].evaluate() for _ in range(2)]
    assert again[0]["eval_objective/scores"] == again[1]["eval_objective/scores"]
    assert asked == [list(runs["with"].eval_dataset["prompt"])] * 4


def test_an_evaluation_leaves_every_random_number_as_it_was(tmp_path: Path) -> None:
    """Also Python's, which a reward function may draw."""

    def noisy(completions: list[str], **_: Any) -> list[float]:
        return [random.random() for _ in completions]

    scores = []
    for evaluated in (False, True):
        changes = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
        trainer = trainer_for(tmp_path / str(evaluated), noisy, evidence=False, **changes)
        trainer.train()
        scores.append([row["objective/scores"] for row in rows_with(trainer, "objective/scores")])
    assert scores[0] == scores[1]
    again = []
    for seed in range(2):
        random.seed(seed)
        again.append(trainer.evaluate()["eval_objective/scores"])
    assert again[0] == again[1], "and each has the same"


def test_reference_normalisation_asks_what_training_asks(tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        asked.extend(prompts)
        return cats(completions)

    changed = prompt_dataset(16).with_transform(lambda rows: {**rows, "prompt": [f"dog {p}" for p in rows["prompt"]]})
    settings = config(tmp_path / "out", score_normalization="reference", normalization_samples=8)
    trainer = PPOTrainer(
        saved_model(tmp_path / "model"), judge, settings, changed, processing_class=word_tokenizer(), peft_config=LORA
    )
    trainer.train()
    assert len(asked) > 16 and all(prompt.startswith("dog ") for prompt in asked)


def test_an_extra_column_does_not_take_the_place_of_the_score(tmp_path: Path) -> None:
    def judge(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("score", ["8/10"] * len(completions))
        return cats(completions)

    trainer = trainer_for(tmp_path, judge, log_completions=True)
    trainer.train()
    for path in (tmp_path / "out" / "completions").glob("*.parquet"):
        table = pd.read_parquet(path)
        assert set(table["extra/score"]) == {"8/10"} and table["score"].dtype.kind == "f"


def test_what_reward_functions_log_in_an_evaluation_is_the_evaluations(tmp_path: Path) -> None:
    def judge(completions: list[str], prompts: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("asked", float(len(prompts)))
        log_extra("evaluated", [len(prompts) == 5] * len(prompts))
        return cats(completions)

    changes = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "log_completions": True}
    trainer = trainer_for(tmp_path, judge, per_device_eval_batch_size=8, **changes)
    trainer.train()
    assert [row["asked"] for row in rows_with(trainer, "asked")] == [8.0, 8.0]
    assert [row["eval_asked"] for row in rows_with(trainer, "eval_asked")] == [5.0] * 4
    tables = list((tmp_path / "out" / "completions").glob("*.parquet"))
    assert len(tables) == 2
    for path in tables:
        assert not pd.read_parquet(path)["evaluated"].any()


def test_a_checkpoint_is_pushed_from_where_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Path] = []

    def push(self: Any, folder: str) -> None:
        assert not (tmp_path / "out" / "unfinished").exists() and (Path(folder) / "trainer_state.json").is_file()
        pushed.append(Path(folder))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda *_, **__: None)
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2, push_to_hub=True, hub_token="hf_mine")
    trainer.train()
    assert pushed == [tmp_path / "out" / f"checkpoint-{step}" for step in (2, 4)]


@pytest.mark.parametrize("disabled", [True, False])
def test_nothing_is_scored_under_dropout(disabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT keeps its dropout as a plain number; a critic or a judge with dropout is another one each time."""
    shape = {"vocab_size": 25, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    often = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3 if disabled else 0.0}
    monkeypatch.setattr("trl_ext.roles.adapted.MIXED_TOKENS", 0)  # PEFT mixes roles in eval mode only
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    model = OPTForCausalLM(OPTConfig(num_attention_heads=2, max_position_embeddings=64, **shape, **often, **ids))
    seen = []

    class Watch(RolloutCallback):
        def on_scores(self, args: Any, state: Any, control: Any, judged: Any) -> None:
            seen.append(trainer.collector.score_pass(judged.rollout))
            for field in fields(judged.score_pass):
                again, before = getattr(seen[-1], field.name), getattr(judged.score_pass, field.name)
                torch.testing.assert_close(again, before, equal_nan=True)

    args = config(tmp_path / "out", disable_dropout=disabled)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)
    data = prompt_dataset(32)
    trainer = PPOTrainer(
        model, cats, args, data, processing_class=word_tokenizer(), peft_config=lora, callbacks=[Watch()]
    )
    trainer.train()
    assert len(seen) == 2
    first = rows_with(trainer, "policy/first_approxkl")[-1]["policy/first_approxkl"]
    assert first < 1e-9 * ROUNDING if disabled else first > 1e-6


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("disabled", [True, False])
def test_the_training_forward_is_the_scoring_forward(disabled: bool, recomputed: bool, tmp_path: Path) -> None:
    """Mixtral's router adds noise in training mode, which no setting of dropout names."""
    shape = {"vocab_size": 25, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    noisy = MixtralConfig(**shape, **heads, router_jitter_noise=0.3, pad_token_id=0, eos_token_id=1)
    args = config(tmp_path / "out", disable_dropout=disabled, gradient_checkpointing=recomputed)
    trainer = PPOTrainer(MixtralForCausalLM(noisy), cats, args, prompt_dataset(32), processing_class=word_tokenizer())
    trainer.train()
    checkpointing = [m for m in trainer.base.modules() if getattr(m, "gradient_checkpointing", False)]
    assert bool(checkpointing) is recomputed and all(module.training for module in checkpointing)
    first = rows_with(trainer, "policy/first_approxkl")[-1]["policy/first_approxkl"]
    assert first < 1e-9 * ROUNDING if disabled else first > 1e-6


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("falcon", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),  # its layers look it up in the config
        ("dbrx", {"resid_pdrop": 0.3, "emb_pdrop": 0.3}),  # a plain number, by another name
        ("codegen", {"resid_pdrop": 0.3}),  # its config has no pad_token_id
    ],
)
def test_dropout_is_off_wherever_a_layer_reads_it(family: str, dropout: dict[str, float], tmp_path: Path) -> None:
    shape = zoo.shrunken(CONFIG_MAPPING[family](), family, dropout)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert not torch.equal(model.train()(ids).logits, model.eval()(ids).logits)  # there is some
    trainer = PPOTrainer(
        model, cats, config(tmp_path / "out"), prompt_dataset(32), processing_class=word_tokenizer(), peft_config=LORA
    )
    trainer.train()
    assert rows_with(trainer, "policy/first_approxkl")[-1]["policy/first_approxkl"] < 1e-9 * ROUNDING


def test_the_cut_into_micro_batches_changes_nothing_in_the_pretraining_term(tmp_path: Path) -> None:
    texts = Dataset.from_dict(
        {"text": ["a cat", "the red bird flew over the house on the tree", "a", "the dog ran"] * 4}
    )
    states = []
    for rows, steps in ((8, 1), (4, 2), (1, 8)):
        trainer = PPOTrainer(
            saved_model(tmp_path / "model"),
            cats,
            config(
                tmp_path / f"out{rows}",
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=steps,
                ptx_coef=1.0,
                generation_kwargs={"do_sample": False},
                max_grad_norm=0.0,
            ),
            prompt_dataset(32),
            processing_class=word_tokenizer(),
            peft_config=LORA,
            ptx_dataset=texts,
        )
        trainer.train()
        states.append((trained_state(trainer), [row["loss/ptx"] for row in rows_with(trainer, "loss/ptx")]))
    for state, losses in states[1:]:
        assert losses == pytest.approx(states[0][1], rel=1e-4)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][0][name], rtol=1e-3, atol=1e-4 * ROUNDING, msg=name)


def test_a_peft_model_is_trained_against_a_frozen_copy_of_its_adapter(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    model = get_peft_model(tiny_llama(), copy.deepcopy(LORA))
    model.get_base_model().config.name_or_path = folder
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer = trainer_for(tmp_path, model=model)
    frozen = {n: p.detach().clone() for n, p in trainer.base.named_parameters() if ".reference." in n}
    assert len(frozen) > 0
    trainer.train()
    assert rows_with(trainer, "objective/kl")[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.base.named_parameters() if n in frozen)


def test_a_callback_that_writes_kl_coef_is_obeyed_in_the_next_rollout(tmp_path: Path) -> None:
    class Doubling(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "objective/kl" in logs:
                args.kl_coef *= 2

    trainer = trainer_for(tmp_path, total_episodes=24, kl_coef=0.1)
    trainer.add_callback(Doubling())
    trainer.train()
    assert [row["objective/kl_coef"] for row in rows_with(trainer, "objective/kl")] == pytest.approx([0.1, 0.2, 0.4])


def test_max_grad_norm_schedule_and_gradient_checkpointing_do_what_a_trainer_user_expects(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, gradient_checkpointing=True, lr_scheduler_type="linear", max_grad_norm=1e-9, logging_steps=1
    )
    before = trained_state(trainer)
    trainer.train()
    rates = [row["learning_rate"] for row in rows_with(trainer, "loss")]
    assert len(rates) == 4 and all(a > b for a, b in pairwise(rates))
    assert rates[0] == pytest.approx(1e-2)
    assert rows_with(trainer, "loss")[0]["grad_norm"] > 1e-6
    # AdamW divides by the gradient's size, but not below adam_epsilon: clipped gradients hardly move anything.
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in trained_state(trainer).items())
    assert moved < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "is empty"),
        ({"train_dataset": Dataset.from_dict({"query": ["a"] * 32})}, "no 'prompt' column"),
        ({"train_dataset": prompt_dataset(4)}, "4 prompts, but one rollout takes 8"),
        ({"train_dataset": prompt_dataset(32, chat=True)}, "no chat template"),
        ({"reward_funcs": None}, "Nothing gives a score"),
        ({"peft_config": 5}, "peft_config must be a peft.LoraConfig"),
        ({"model": 5}, "model must be a name"),
        ({"peft_config": LoraConfig(target_modules=["lm_head"])}, "LM head"),
        ({"peft_config": LoraConfig(modules_to_save=["embed_tokens"])}, "modules_to_save"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    arguments: dict[str, Any] = {
        "model": "some/model",
        "reward_funcs": cats,
        "args": config(tmp_path / "out"),
        "train_dataset": prompt_dataset(32),
        "processing_class": word_tokenizer(),
        "peft_config": LORA,
        **changes,
    }
    with pytest.raises((ValueError, TypeError)) as error:
        PPOTrainer(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
