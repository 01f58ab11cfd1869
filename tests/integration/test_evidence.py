"""What a run measures beside its training: the right numbers, and nothing of the training moved."""

import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from tests.helpers import DEVICE, prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with, trained_state, trainer_for
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase
from trl_ext.core import clipped_policy_loss, estimate_advantages
from trl_ext.ppo.evidence import LOST, ROWS, TWINS, Frozen, Schedule, other_tokens, reading, sampled, written_otherwise
from trl_ext.ppo.objectives import Clip


def rewarding(kind: str) -> Any:
    """A reward function and the list of how many completions each of its calls had."""
    calls: list[int] = []

    def of_the_prompt(prompts: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        return [float(len(prompt)) for prompt in prompts]

    def noise(prompts: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        return [random.gauss(0, 1) for _ in prompts]

    async def awaited(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        return cats(completions)

    def once_only(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        return cats(completions)

    once_only.repeatable = False  # type: ignore[attr-defined]
    made = {"of_the_prompt": of_the_prompt, "noise": noise, "awaited": awaited, "once_only": once_only}[kind]
    return made, calls


def measured(trainer: PPOTrainer, name: str) -> list[float]:
    return [row[f"evidence/{name}"] for row in rows_with(trainer, f"evidence/{name}")]


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_measuring_changes_nothing_of_the_training(value: str, tmp_path: Path) -> None:
    noisy, _ = rewarding("noise")
    changes = {"total_episodes": 96, "per_device_train_batch_size": 16, "disable_dropout": False, "entropy_coef": 0.01}
    runs = []
    for evidence in (True, False):
        torch.manual_seed(0)
        base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA, value=value)
        trainer = trainer_for(tmp_path / str(evidence), noisy, model=base, evidence=evidence, **changes)
        trainer.train()
        runs.append(trainer)
    assert measured(runs[0], "gradient/score") and not rows_with(runs[1], "evidence/gradient/score")
    for before, after in zip(*(trained_state(run).values() for run in runs), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    theirs = ("evidence/", "time/", "eps", "memory/", "train_")
    for with_, without in zip(*(run.state.log_history for run in runs), strict=True):
        assert {k: v for k, v in with_.items() if not k.startswith(theirs)} == {
            k: v for k, v in without.items() if not k.startswith(theirs)
        }


def test_a_run_that_resumes_measures_what_an_unbroken_one_measures(tmp_path: Path) -> None:
    changes = {"total_episodes": 64, "num_mini_batches": 2, "per_device_train_batch_size": 8, "save_strategy": "steps"}
    whole = trainer_for(tmp_path / "whole", **changes, save_steps=1)
    whole.train()
    for step in (1, 6):  # within the first epoch of a rollout, and in the second
        broken = trainer_for(tmp_path / f"from{step}", **changes, save_steps=100)
        broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / f"checkpoint-{step}"))
        for one, other in zip(whole.state.log_history[:-1], broken.state.log_history[:-1], strict=True):
            names = [name for name in one if name.startswith("evidence/")]
            assert names and {name: one[name] for name in names} == {name: other[name] for name in names}


def test_a_score_of_the_prompt_alone_has_no_variance_within_prompts(tmp_path: Path) -> None:
    function, calls = rewarding("of_the_prompt")
    trainer = trainer_for(tmp_path, function, per_device_train_batch_size=32, total_episodes=32)
    trainer.train()
    assert measured(trainer, "score/within_prompt") == [0.0]
    assert measured(trainer, "noise/of_the_prompt") == [0.0]
    assert calls == [32, 2 * TWINS, TWINS], "the rollout; again, with second completions; with other rows' prompts"


@pytest.mark.parametrize(
    ("kind", "repeats"),
    [("place", False), ("row above", False), ("block", False), ("rank", True), ("completion", True)],
)
def test_what_a_place_or_a_neighbour_decides_does_not_repeat(kind: str, repeats: bool, tmp_path: Path) -> None:
    """The second look hands rows over in another order. A rank needs other rows beside it to change."""

    def function(completions: list[str], **_: Any) -> list[float]:
        scores = cats(completions)
        return {
            "place": [float(i) for i in range(len(scores))],
            "row above": scores[-1:] + scores[:-1],
            "block": [sum(scores[i - i % 4 : i - i % 4 + 4]) for i in range(len(scores))],
            "rank": [float(sum(other < score for other in scores) > len(scores) / 2) for score in scores],
            "completion": scores,
        }[kind]

    trainer = trainer_for(tmp_path, function, per_device_train_batch_size=TWINS, total_episodes=TWINS)
    trainer.train()
    (found,) = measured(trainer, "noise/function")
    assert (found < 0.2) is repeats


def test_how_surprising_prompts_are(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, cats, per_device_train_batch_size=32, total_episodes=32)
    trainer.train()
    (row,) = rows_with(trainer, "evidence/prompts/surprise")
    rows = trainer.experience.rollout.rows(torch.arange(ROWS))
    base, nats = trainer.base, []
    for ids in rows.prompt_tokens:
        if len(ids) < 2:  # nothing stands before it
            continue
        with torch.no_grad():
            batch = torch.tensor([ids])
            logprobs = base(batch, torch.ones_like(batch), len(ids) - 1, roles=["reference"])["ref_logprobs"]
        nats.append(-float(logprobs.double().mean()))
    mean = sum(nats) / len(nats)
    error = (sum((x - mean) ** 2 for x in nats) / (len(nats) - 1) / len(nats)) ** 0.5
    assert row["evidence/prompts/surprise"] == pytest.approx(mean, rel=1e-4)
    assert row["evidence/prompts/surprise_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("num_generations", [1, 4])
def test_a_score_that_reads_no_prompt_is_not_moved_by_another(num_generations: int, tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 32, "total_episodes": 32, "num_generations": num_generations}
    of_the_prompt, _ = rewarding("of_the_prompt")
    moved = []
    for name, function in (("completion", cats), ("prompt", of_the_prompt)):
        trainer = trainer_for(tmp_path / name, function, **changes)
        trainer.train()
        moved += measured(trainer, "score/moved_by_prompt")
    assert moved[0] == 0.0 and moved[1] > 0.5


@pytest.mark.parametrize("num_generations", [1, 4])
def test_completions_that_are_the_same_tell_nothing_of_what_a_score_reads(num_generations: int, tmp_path: Path) -> None:
    """Greedy, as top_k=1 makes it: all completions of a prompt are the first one, so that no score differs."""
    function, _ = rewarding("of_the_prompt")
    changes = {"per_device_train_batch_size": 32, "total_episodes": 32, "num_generations": num_generations}
    trainer = trainer_for(tmp_path / "greedy", function, **changes, top_k=1)
    trainer.train()
    assert measured(trainer, "score/within_prompt") == []
    trainer = trainer_for(tmp_path / "sampled", function, **changes)
    trainer.train()
    assert measured(trainer, "score/within_prompt") == [0.0]


def test_scores_that_are_all_the_same_tell_nothing_of_what_they_read(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, lambda completions, **_: [1.0] * len(completions), per_device_train_batch_size=32, total_episodes=32
    )
    trainer.train()
    assert measured(trainer, "score/moved_by_prompt") == []


def test_prompts_that_a_chat_model_was_not_taught_to_read() -> None:
    tokenizer = word_tokenizer()
    assert reading(["a"], tokenizer) == {}
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    messages = [{"role": "user", "content": "a"}]
    assert reading(["a", messages], tokenizer) == {"prompts/plain": 0.5, "prompts/unknown_markers": 1.0}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    assert reading([messages], tokenizer) == {"prompts/plain": 0.0, "prompts/unknown_markers": 0.5}
    assert reading(["a"], tokenizer) == {"prompts/plain": 1.0}


def test_tokens_that_a_tokenizer_reads_as_others() -> None:
    """ "a b c" of a model is "a ? ?" to a tokenizer that has lost b and c; the first token and marks do not count."""
    whole, lossy = word_tokenizer(), word_tokenizer()
    ids = [[*whole("a cat sat", add_special_tokens=False)["input_ids"], 1], [1], []]
    assert len(ids[0]) == 4 and other_tokens(ids, whole) == 0.0
    assert math.isnan(other_tokens([[1], [5]], whole))
    assert other_tokens([[5, 6, 10_000]], whole) == 0.5  # a model may have more ids than its tokenizer
    assert math.isnan(other_tokens([[5, 6]], None)) and math.isnan(other_tokens([], whole))
    lossy.backend_tokenizer.normalizer = normalizers.Replace("sat", "mat")
    assert other_tokens(ids, lossy) == 0.5
    lossy.backend_tokenizer.normalizer = normalizers.Replace("a cat", "the cat")
    assert other_tokens(ids, lossy) == 0.0


def test_prompts_that_the_models_own_tokenizer_writes_otherwise(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    own, other, none = word_tokenizer(plain), word_tokenizer(plain + " cat"), word_tokenizer()
    prompts = [[{"role": "user", "content": text}] for text in ("a cat", "a mat")]
    assert written_otherwise(prompts, own, own, None) == 0.0 and written_otherwise(prompts, other, own, None) == 1.0
    assert all(math.isnan(written_otherwise(prompts, own, one, None)) for one in (None, none))
    given = {"chat_template": plain + " cat"}
    assert written_otherwise(prompts, own, own, given) == 1.0 and written_otherwise(prompts, own, own, {}) == 0.0
    folder = saved_model(tmp_path / "model")  # with its tokenizer beside it
    base = SharedBase.from_pretrained(folder, policy=LORA, dtype="float32")
    for tokenizer, share in ((None, 0.0), (lossy_tokenizer(), 1.0)):
        trainer = PPOTrainer(base, cats, config(tmp_path), prompt_dataset(), processing_class=tokenizer)
        trainer.train()
        assert measured(trainer, "prompts/otherwise")[0] == share


def test_the_tokenizer_of_an_adapter_is_its_own(tmp_path: Path) -> None:
    """Who was trained further may have been taught another template: that of the base says nothing."""
    adapter = tmp_path / "adapter"
    lossy_tokenizer().save_pretrained(adapter)
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA, dtype="float32")
    for of_an_adapter, shares in ((False, [1.0]), (True, [])):
        if of_an_adapter:
            (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(adapter)
        trainer = PPOTrainer(base, cats, config(tmp_path), prompt_dataset(), processing_class=tokenizer)
        trainer.train()
        assert measured(trainer, "prompts/otherwise")[:1] == shares


def lossy_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("sat", "mat")
    return tokenizer


def test_noise_does_not_repeat(tmp_path: Path) -> None:
    function, _ = rewarding("noise")
    trainer = trainer_for(tmp_path, function, per_device_train_batch_size=32, total_episodes=32 * 4)
    trainer.train()
    found = measured(trainer, "noise/noise")
    assert sum(found) / len(found) > 0.5
    assert measured(trainer_for(tmp_path / "cats", total_episodes=8), "noise/cats") == []


def by_place(prompts: list[str], **_: Any) -> list[float]:
    return [float(place) for place in range(len(prompts))]


def by_chance(prompts: list[str], **_: Any) -> list[float]:
    return [random.gauss(0, 1) for _ in prompts]


def by_others(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """What all completions of a batch say counts against each of them."""
    own = [text.count("a") + len(text) / 10 for text in completions]
    return [one - sum(own) / 4 for one in own]


@pytest.mark.parametrize(
    ("function", "chance", "place"), [(by_place, False, True), (by_chance, True, True), (by_others, False, False)]
)
def test_what_does_not_repeat_is_taken_apart(function: Any, chance: bool, place: bool, tmp_path: Path) -> None:
    """By chance, by the places of rows, or by who else is scored."""
    trainer = trainer_for(tmp_path, function, per_device_train_batch_size=32, total_episodes=32)
    trainer.train()
    name = function.__name__
    (differs,) = measured(trainer, f"noise/{name}")
    (of_chance,), (of_place,) = (measured(trainer, f"noise_{kind}/{name}") for kind in ("by_chance", "by_place"))
    assert differs > 0.2
    assert (of_chance > 0.2) == chance and (of_place > 0.2) == place
    assert chance or of_chance == 0.0


@pytest.mark.parametrize("noisy_first", [True, False])
def test_a_function_that_is_not_called_again_hides_no_noisy_one(noisy_first: bool, tmp_path: Path) -> None:
    once_only, _ = rewarding("once_only")
    functions = [by_chance, once_only] if noisy_first else [once_only, by_chance]
    trainer = trainer_for(tmp_path, functions, per_device_train_batch_size=32, total_episodes=32)
    trainer.train()
    assert measured(trainer, "noise_by_chance/by_chance")[0] > 0.2
    assert not measured(trainer, "noise_by_chance/once_only")


@pytest.mark.parametrize("kind", ["awaited", "once_only"])
def test_a_function_that_may_be_costly_is_not_called_for_a_measurement(kind: str, tmp_path: Path) -> None:
    function, calls = rewarding(kind)
    trainer = trainer_for(tmp_path, function, total_episodes=16)
    trainer.train()
    assert calls == [8, 8]
    assert not measured(trainer, f"noise/{kind}")
    function.repeatable = True
    trainer = trainer_for(tmp_path / "again", function, total_episodes=8)
    trainer.train()
    assert calls == [8, 8, 8, 16, 8] and measured(trainer, f"noise/{kind}") == [0.0]


def test_repeated_prompts_of_a_rollout_need_no_second_completions(tmp_path: Path) -> None:
    function, calls = rewarding("of_the_prompt")
    trainer = trainer_for(
        tmp_path, function, per_device_train_batch_size=16, num_generations=4, total_episodes=32, num_ppo_epochs=8
    )
    trainer.train()
    assert measured(trainer, "score/within_prompt") == [0.0, 0.0]
    assert max(calls) == 16


def test_a_function_that_fails_the_second_time_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def once(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("gone")
        return cats(completions)

    trainer = trainer_for(tmp_path, once, total_episodes=16)
    trainer.train()
    assert "is left out" in caplog.text and len(rows_with(trainer, "objective/scores")) == 2


class Remembering(Clip):
    """Keeps a state, as a baseline that moves along does; what is in `kept` with it may not be copied."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept, self.calls = kept, 0

    def advantages(self, shaped: Any, args: Any) -> Any:
        self.calls += 1
        return super().advantages(shaped, args)


class ByScores(Clip):
    """Divides by the spread of the rewards, which of the KL's part alone is 0."""

    def advantages(self, shaped: Any, args: Any) -> Any:
        advantages, returns = super().advantages(shaped, args)
        return advantages * float(shaped.rewards.abs().sum() / shaped.rewards.abs().sum()), returns


def test_a_measurement_leaves_an_objective_of_ones_own_as_it_was(tmp_path: Path) -> None:
    calls = []
    for evidence in (False, True):
        objective = Remembering()
        trainer = trainer_for(tmp_path / str(evidence), objective=objective, evidence=evidence)
        trainer.train()
        calls.append(objective.calls)
    assert calls[0] == calls[1] > 0 and rows_with(trainer, "evidence/gradient/score")


@pytest.mark.parametrize("objective", [Remembering(threading.Lock()), ByScores()], ids=["lock", "0 over 0"])
def test_an_objective_that_cannot_be_measured_ends_no_run(
    objective: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(tmp_path, objective=objective)
    trainer.train()
    assert "is left out" in caplog.text and len(rows_with(trainer, "objective/scores")) == 2
    assert not rows_with(trainer, "evidence/gradient/score")


def test_shares_are_of_the_whole_reward(tmp_path: Path) -> None:
    """A penalty that dwarfs the score makes nearly all of the variance."""

    def tiny(completions: list[str], **_: Any) -> list[float]:
        return [1e-3 * n for n in cats(completions)]

    trainer = trainer_for(tmp_path, tiny, per_device_train_batch_size=32, total_episodes=32, missing_eos_penalty=50.0)
    trainer.train()
    (row,) = rows_with(trainer, "evidence/share/missing_eos_penalty")
    assert row["evidence/share/missing_eos_penalty"] == pytest.approx(1.0, abs=0.01)
    shares = [value for name, value in row.items() if name.startswith("evidence/share")]
    assert sum(shares) == pytest.approx(1.0)
    cut = row["completions/clipped_ratio"]
    assert row["evidence/reward_std"] == pytest.approx(50 * math.sqrt(cut * (1 - cut)), rel=0.01)


class Terms(RolloutCallback):
    """Gradients of PPO's own loss on the rows that are measured, at the start of a rollout."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.trainer: Any = None

    def on_advantages(self, experience: Any) -> None:
        base, updater = self.trainer.base, self.trainer.updater
        batch = experience.rows(torch.arange(ROWS)).to(base.device)
        rollout = batch.rollout
        with torch.enable_grad():
            new = base.logprobs(rollout.input_ids, rollout.attention_mask, rollout.completion_ids.shape[1])
            loss = clipped_policy_loss(new, batch.score_pass.logprobs, batch.advantages, batch.loss_mask, 0.2)
        gradients = torch.autograd.grad(loss, updater._parameters["policy"])
        self.norms.append(math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares to six digits")
def test_the_terms_add_up_to_the_policys_gradient(tmp_path: Path) -> None:
    """From norms and cosines of score, KL and values alone that of their sum follows only with all cosines; with a
    kl_coef of 0 and no values yet the score's is the whole."""
    terms = Terms()
    trainer = PPOTrainer(
        saved_model(tmp_path / "model"),
        cats,
        config(tmp_path / "out", kl_coef=0.0, total_episodes=8),
        prompt_dataset(32),
        processing_class=word_tokenizer(),
        peft_config=LORA,
        callbacks=[terms],
    )
    terms.trainer = trainer
    trainer.train()
    assert measured(trainer, "gradient/kl") == [0.0] and measured(trainer, "gradient/baseline")[0] == pytest.approx(
        0, abs=1e-6
    )
    assert measured(trainer, "gradient/score")[0] == pytest.approx(terms.norms[0], rel=1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compares to six digits")
@pytest.mark.parametrize("value", ["adapter", "head"])
def test_terms_that_share_a_forward_have_gradients_of_their_own(value: str, tmp_path: Path) -> None:
    """Each of its own coefficient, doubled; with recomputed activations they are the same."""
    found = []
    for changes in ({}, {"gradient_checkpointing": True}, {"vf_coef": 0.2, "entropy_coef": 0.02, "kl_coef": 0.1}):
        torch.manual_seed(0)
        base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA, value=value)
        torch.nn.init.normal_(base.heads["value"].weight, std=0.1)  # a head of zeros has no gradient for the trunk
        settings = {"total_episodes": 16, "vf_coef": 0.1, "entropy_coef": 0.01, "kl_coef": 0.05, **changes}
        trainer = trainer_for(tmp_path / str(len(found)), model=base, **settings)
        trainer.train()
        names = ("gradient/score", "gradient/entropy", "cosine/score~entropy")
        names += ("gradient/value", "cosine/score~value") if value == "head" else ()
        found.append({name: measured(trainer, name)[0] for name in names})
    plain, recomputed, doubled = found
    assert recomputed == pytest.approx(plain, rel=1e-5)
    times = {name: 2.0 if name in ("gradient/entropy", "gradient/value") else 1.0 for name in plain}
    assert doubled == pytest.approx({name: times[name] * plain[name] for name in plain}, rel=1e-5)


def test_as_often_as_the_share_of_an_update_allows() -> None:
    """The demo's settings by hand: an update is 16 decoding steps and 4 x 2 micro-batches, each a forward and a
    backward (3) of two roles: 64. Three forwards and the backwards of three terms over 8 of 32 rows cost 9 / 4 of a
    forward, and completions 16; 0.25% of 64 is 0.16."""
    args = PPOConfig("out", use_cpu=True, per_device_train_batch_size=32, num_mini_batches=2, max_completion_length=16)
    assert Schedule.of(args, 2) == Schedule(gradients=15, twins=105)


@pytest.mark.parametrize(
    "changes",
    [{}, {"whiten_rewards": True}, {"whiten_advantages": False}, {"objective": "sequence"}],
    ids=["plain", "whitened rewards", "raw advantages", "no critic"],
)
def test_the_advantages_are_the_sum_of_their_parts(changes: dict[str, Any], tmp_path: Path) -> None:
    """Against the experience that was trained on, with a KL and values that are not 0 any more."""
    trainer = trainer_for(tmp_path, total_episodes=32, kl_coef=0.5, missing_eos_penalty=1.0, **changes)
    trainer.train()
    experience, measuring = trainer.experience, trainer.updater.evidence
    assert experience is not None and measuring is not None
    parts = measuring._advantages_by_part(experience)
    kept = experience.loss_mask
    assert all(float(parts[name][kept].abs().max()) > 1e-4 for name in ("score", "kl"))
    assert bool(parts["baseline"][kept].abs().max() > 1e-4) is (changes.get("objective") != "sequence")
    torch.testing.assert_close(sum(parts.values())[kept], experience.advantages[kept], rtol=1e-4, atol=1e-4)
    if not {"objective", "whiten_rewards"} & set(
        changes
    ):  # what is left is what values alone make, on one scale with the rest
        values = experience.score_pass.values
        alone = estimate_advantages(torch.zeros_like(values), values, kept, 1.0, 0.95)[0][kept]
        left = parts["baseline"][kept]
        together = torch.stack([left, alone]).double()
        centred = together - together.mean(dim=1, keepdim=True)
        slope = (centred[0] @ centred[1]) / (centred[1] @ centred[1])
        torch.testing.assert_close(centred[0], slope * centred[1], rtol=1e-3, atol=1e-4)
        assert float(slope) > 0 and (float(slope) == pytest.approx(1.0, rel=1e-3)) is (
            changes.get("whiten_advantages") is False
        )


@pytest.mark.parametrize("of", ["base_layer.weight", "embed_tokens.weight"])
def test_frozen_weights_that_change_are_seen(of: str, tmp_path: Path) -> None:
    class Writes(RolloutCallback):
        def on_update_end(self) -> None:
            with torch.no_grad():
                for name, parameter in trainer.base.named_parameters():
                    if name.endswith(of):
                        parameter.add_(0.5)

    trainer = trainer_for(tmp_path, total_episodes=32)
    assert any(name.endswith(of) for name, _ in trainer.base.named_parameters())
    trainer.train()
    assert measured(trainer, "base_moved") == [0.0] * 4, "what is trained moves, and nothing else"
    trainer.add_callback(Writes())
    trainer.train()
    again = measured(trainer, "base_moved")[-4:]
    assert again[0] == 0.0 and min(again[1:]) > 0.01


def test_a_frozen_weight_that_is_lost_has_moved(tmp_path: Path) -> None:
    base = trainer_for(tmp_path).base
    frozen = Frozen(base, base.trainable_parameters("policy"))
    assert frozen.moved() == 0.0
    weight = next(one for name, one in base.named_parameters() if name.endswith("base_layer.weight"))
    with torch.no_grad():
        weight.fill_(math.nan)
    assert frozen.moved() == LOST


def test_each_rollout_tells_what_the_adapters_precision_takes(tmp_path: Path) -> None:
    """bfloat16 has eight bits of mantissa. A run's first step loses nothing: it moves second matrices that are 0."""
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = trainer_for(tmp_path / str(dtype), total_episodes=32, learning_rate=1e-3)
        for parameter in trainer.base.trainable_parameters("policy"):
            parameter.data = parameter.data.to(dtype)
        trainer.train()
        lost[dtype] = measured(trainer, "lost_to_rounding")
    assert len(lost[torch.float32]) == len(lost[torch.bfloat16]) == 4
    assert max(lost[torch.float32]) < 1e-6
    assert min(lost[torch.bfloat16][1:]) > 1e-4


def test_a_gradient_is_seen_in_both_of_loras_matrices() -> None:
    """Whatever the number of layers and of targets, whose product decides which parameters are looked at."""

    def pair(of_second: bool) -> list[torch.nn.Parameter]:
        both = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        both[of_second].grad = torch.ones(2)
        return both

    for pairs in range(1, 600):
        for of_second in (False, True):
            parameters = [one for _ in range(pairs) for one in pair(of_second)]
            numbers = sampled(parameters)
            assert 0 < float(numbers.sum()) < len(numbers) <= 2 * min(2 * pairs, 63), pairs
