"""Reward models from every form of feedback: really trained, saved by TRL, loaded as the reward role."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification

from tests.helpers import DEVICE, PLACE, QUIET, saved_model, word_tokenizer
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, SharedBase, feedback, launch
from trl_ext.reward_models.probing import probe_data, score_head

ANSWERS = [" dog", " bird", " tree", " cat"]  # from bad to good
OBJECTIVES = ["pairwise", "regression", "binary", "ranking", "all_pairs", "probe"]


def rated() -> feedback.Feedback:
    prompts = ["the red", "the blue", "a small", "a big"]
    records = [
        feedback.Rating(prompt, answer, (1.0 + worth, 1.5 + worth))
        for prompt in prompts
        for worth, answer in enumerate(ANSWERS)
    ]
    return feedback.Feedback("ratings", records, "here")


def rows_for(objective: str) -> Dataset:
    makers: dict[str, Any] = {
        "pairwise": feedback.to_preference,
        "regression": feedback.to_ratings,
        "probe": feedback.to_preference,
        "binary": feedback.to_unpaired,
        "ranking": feedback.to_rankings,
        "all_pairs": feedback.to_rankings,
    }
    rows = makers[objective](rated())
    keep = [c for c in rows.column_names if c not in ("agreement", "margin")]
    return rows.select_columns(keep)


def train(objective: str, tmp_path: Path, **changes: Any) -> FeedbackRewardTrainer:
    saved_model(tmp_path / "model")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 30,
        "learning_rate": 2e-2,
        **QUIET,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 4,
    }
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective=objective, **{**settings, **changes})
    trainer = FeedbackRewardTrainer(
        str(tmp_path / "model"),
        args,
        rows_for(objective),
        rows_for(objective),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def scores_of(base: SharedBase, prompt: str) -> list[float]:
    tokenizer = word_tokenizer()
    ids = [tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"] for answer in ANSWERS]
    return [float(base.scores(row, torch.ones_like(row))) for row in ids]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gives_a_reward_role_that_knows_better_from_worse(objective: str, tmp_path: Path) -> None:
    trainer = train(objective, tmp_path)
    if objective != "probe":
        logs = [row for row in trainer.state.log_history if "loss" in row]
        assert all(row["min_reward"] < row["mean_reward"] < row["max_reward"] for row in logs)
    base = SharedBase.from_pretrained(str(tmp_path / "model"), reward=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "trl_ext_role.json").read_text(encoding="utf-8")) == {"quantized": False}
    right = total = 0
    with torch.no_grad():
        for prompt in ("the red", "a big"):
            scores = scores_of(base, prompt)
            for better in range(4):
                for worse in range(better):
                    right += scores[better] > scores[worse]
                    total += 1
    assert right / total >= (0.8 if objective in ("binary", "probe") else 1.0), (right, total)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if objective == "probe":  # solved at once, from the loss of a head of zeros
        losses = [math.log(2), trainer.state.log_history[0]["train_loss"]]
    assert losses[-1] < losses[0]
    assert "eval_loss" in trainer.evaluate()


def test_the_probe_leaves_the_trunk_alone(tmp_path: Path) -> None:
    trainer = train("probe", tmp_path, num_train_epochs=1)
    lora_b = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert lora_b and all(not parameter.any() for parameter in lora_b)


def test_the_probe_reads_the_same_in_batches_of_any_size(tmp_path: Path) -> None:
    trainer = train("probe", tmp_path, num_train_epochs=1)
    rows = trainer.train_dataset.map(lambda row, i: {"chosen_ids": row["chosen_ids"] * (1 + i % 3)}, with_indices=True)
    alone, together = (probe_data(trainer.model, rows, size) for size in (1, 5))
    assert torch.equal(alone.pairs, together.pairs)
    torch.testing.assert_close(together.features, alone.features, rtol=1e-5, atol=1e-6)
    lengths = {len(ids) for row in rows for ids in (row["chosen_ids"], row["rejected_ids"])}
    assert len(lengths) > 2, "some of them are padded"


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "EOS pads"])
def test_the_probe_reads_what_the_model_scores(pad: bool, tmp_path: Path) -> None:
    """Where EOS is the pad token too, Transformers reads a score at the token before it."""
    saved_model(tmp_path / "model")
    word_tokenizer(pad=pad).save_pretrained(tmp_path / "model")
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective="probe", **QUIET)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    rows = rows_for("probe")
    trainer = FeedbackRewardTrainer(str(tmp_path / "model"), args, rows, rows, peft_config=lora)
    data, model = probe_data(trainer.model, trainer.train_dataset), trainer.model.eval()
    weight = torch.randn(16)
    with torch.no_grad():
        for module in score_head(model).modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(weight.unsqueeze(0))
        chosen = trainer.train_dataset[0]["chosen_ids"]
        expected = float(model(torch.tensor([chosen], device=model.device)).logits)
    assert float(data.features[data.pairs[0, 0]] @ weight.double()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert chosen[-1] == 1, "an EOS at its end"


def test_padding_and_order_do_not_matter_to_the_loss(tmp_path: Path) -> None:
    """A batch's loss is the same whether its rows come with longer ones or not, and each row's score that of the row
    alone."""
    trainer = train("regression", tmp_path, num_train_epochs=1)
    rows = [trainer.train_dataset[i] for i in range(3)]
    rows = [{**row, "sequences": [row["sequences"][0][i:]]} for i, row in enumerate(rows)]  # of different lengths
    alone = {key: value.to(DEVICE) for key, value in trainer.data_collator(rows).items()}
    wide = {key: value.clone() for key, value in alone.items()}
    fill = torch.full((3, 5), 0, device=DEVICE)  # the pad token
    wide["input_ids"] = torch.cat([wide["input_ids"], fill], dim=1)
    wide["attention_mask"] = torch.cat([wide["attention_mask"], fill], dim=1)
    trainer.model.eval()
    assert len({len(row["sequences"][0]) for row in rows}) == 3
    with torch.no_grad():
        singly = [float(trainer.model(torch.tensor(row["sequences"], device=DEVICE)).logits) for row in rows]
        together = trainer.model(alone["input_ids"], alone["attention_mask"]).logits.flatten().tolist()
        assert together == pytest.approx(singly, rel=1e-4)
        losses = [float(trainer.compute_loss(trainer.model, batch)) for batch in (alone, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        ("regression", {"prompt": ["a"], "completion": ["b"]}, "train_dataset has no 'rating' column"),
        ("ranking", {"prompt": ["a"], "completion": ["b"]}, "no 'completions' and no 'ranks' column"),
        ("regression", {"completion": ["a", "b"], "rating": [2, 2]}, "Every rating is 2: nothing can be learned"),
        ("binary", {"completion": ["a", "b"], "label": [True, True]}, "Every label is 1: nothing can be learned"),
        ("ranking", {"completions": [["a", "b"]], "ranks": [[1, 1]]}, "Every ranking is one tie: nothing can be"),
        ("binary", {"completion": ["a", "b"], "label": [1, 0], "weight": [0.0, 0.0]}, "Every weight is 0: nothing"),
    ],
)
def test_bad_feedback_is_one_sentence(objective: str, rows: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = FeedbackRewardConfig(str(tmp_path), objective=objective, max_length=8, **PLACE)
    with pytest.raises(ValueError, match=message):
        FeedbackRewardTrainer(str(tmp_path), args, Dataset.from_dict(rows), processing_class=word_tokenizer())


def test_rows_that_are_all_too_long(tmp_path: Path) -> None:
    args = FeedbackRewardConfig(str(tmp_path), objective="regression", max_length=8, **PLACE)
    rows = Dataset.from_dict({"completion": [" cat" * 50, " dog" * 50], "rating": [1, 2]})
    with pytest.raises(ValueError, match=r"Every row of train_dataset is longer than max_length 8: raise it\."):
        FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows)


def test_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match="objective is 'hinge': choose one of pairwise, regression"):
        FeedbackRewardConfig("out", objective="hinge")


def test_rows_of_like_length_are_batched_together(tmp_path: Path) -> None:
    """`train_sampling_strategy: group_by_length` finds lengths in rows of every objective."""
    for objective in ("pairwise", "regression"):
        trainer = train(objective, tmp_path / objective, num_train_epochs=1, train_sampling_strategy="group_by_length")
        longest = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]
        assert list(trainer.train_dataset["length"]) == longest
        assert "eval_loss" in trainer.evaluate()


def test_rows_are_tokenised_by_the_template_that_is_saved(tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}", encoding="utf-8")
    says = [[{"role": "user", "content": text}] for text in ("the cat", "a dog")]
    rows = Dataset.from_dict({"completion": says, "rating": [1.0, 2.0]})
    how: dict[str, Any] = {"chat_template_path": str(template), "pad_to_multiple_of": 8, **QUIET}
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective="regression", **how)
    several = {"one": rows, "other": rows.select([1])}
    trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows, several)
    assert [ids[0] for ids in trainer.train_dataset["sequences"]] == [[7, 9, 1], [8, 10, 1]]
    assert trainer.data_collator(list(trainer.train_dataset))["input_ids"].shape == (2, 8)
    assert {"eval_one_loss", "eval_other_loss"} <= set(trainer.evaluate())
    assert "eval_loss" in trainer.evaluate(rows), "rows as they come"


def test_rows_in_ids_have_their_scale_already(tmp_path: Path) -> None:
    trainer = train("regression", tmp_path, num_train_epochs=1)
    args = FeedbackRewardConfig(str(tmp_path / "again"), objective="regression", **QUIET)
    again = FeedbackRewardTrainer(str(tmp_path / "model"), args, trainer.train_dataset)
    assert again.train_dataset.to_list() == trainer.train_dataset.to_list()
    assert min(row for rows in again.train_dataset["targets"] for row in rows) < 0, "standardised, and once"


def test_weights_count_across_batches(tmp_path: Path) -> None:
    """One row a batch: a normalisation within batches would make all weights alike."""
    rows = Dataset.from_dict({"completion": ["the cat", "a dog"], "label": [True, False], "weight": [0.1, 0.3]})
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective="binary", per_device_eval_batch_size=1, **QUIET)
    trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows, rows)
    assert [weights for (weights,) in trainer.train_dataset["weights"]] == pytest.approx([0.5, 1.5])
    with torch.no_grad():
        scores = [float(trainer.model(torch.tensor([[*ids, 1]], device=DEVICE)).logits) for ids in ([7, 9], [8, 10])]
    expected = (0.5 * math.log(1 + math.exp(-scores[0])) + 1.5 * math.log(1 + math.exp(scores[1]))) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_processes_may_hold_rankings_of_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes exchange has the same shape on each: here another one's three scores."""
    trainer = train("ranking", tmp_path, num_train_epochs=1)
    theirs = torch.tensor([-9.0, 9.0, 3.0, 3.0], device=DEVICE)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda mine: torch.cat([mine, theirs]))
    batch = {key: value.to(DEVICE) for key, value in trainer.data_collator([trainer.train_dataset[0]]).items()}
    trainer.model.eval()
    with torch.no_grad():
        scores = trainer.model(batch["input_ids"], batch["attention_mask"]).logits.flatten()
        trainer.compute_loss(trainer.model, batch)
    logged = trainer._metrics["eval"]
    assert (logged["min_reward"][-1], logged["max_reward"][-1]) == (-9.0, 9.0)
    assert logged["mean_reward"][-1] == pytest.approx((float(scores.sum()) + 3.0) / (len(scores) + 3), rel=1e-5)


@pytest.mark.parametrize("objective", ["ranking", "all_pairs"])
def test_scores_of_rankings_are_held_near_0_where_that_is_asked_for(objective: str, tmp_path: Path) -> None:
    trainer = train(objective, tmp_path, num_train_epochs=1)
    batch = {key: value.to(DEVICE) for key, value in trainer.data_collator([trainer.train_dataset[0]]).items()}
    trainer.model.eval()
    losses = []
    for coefficient in (None, 0.5):
        trainer.args.center_rewards_coefficient = coefficient
        with torch.no_grad():
            loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        losses.append(float(loss))
    assert losses[1] - losses[0] == pytest.approx(0.5 * float((outputs.logits**2).mean()), rel=1e-4)


def test_some_rows_too_long_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"completion": ["the cat", "a dog sat on the mat", "a bird"], "rating": [1.0, 2.0, 3.0]})
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective="regression", max_length=4, **QUIET)
    with caplog.at_level("WARNING"):
        trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows)
    assert [ids[0] for ids in trainer.train_dataset["sequences"]] == [[7, 9, 1], [8, 11, 1]]
    assert "1 rows of" in caplog.text and "are longer than max_length 4 and left out" in caplog.text


def test_a_head_that_no_probe_is_fitted_to() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=1, **sizes))
    with pytest.raises(ValueError, match=r"^objective 'probe' fits .* and a BertForSequenceClassification has none"):
        score_head(encoder)


def test_the_probe_is_told_the_margins(tmp_path: Path) -> None:
    pairs = rows_for("probe")
    with_margins = pairs.add_column("margin", [float(i % 3) for i in range(len(pairs))])
    args = FeedbackRewardConfig(str(tmp_path / "out"), objective="probe", **QUIET)
    trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, with_margins)
    assert probe_data(trainer.model, trainer.train_dataset).margins.tolist() == with_margins["margin"]


def test_held_out_answers_score_the_same_in_batches_of_any_size(tmp_path: Path) -> None:
    train("regression", tmp_path, num_train_epochs=1)
    base = SharedBase.from_pretrained(str(tmp_path / "model"), reward=str(tmp_path / "out"))
    rows = rows_for("regression").map(
        lambda row, i: {"completion": row["completion"] + " cat dog" * (i % 3)}, with_indices=True
    )
    alone, together = (launch.scored_answers(base, word_tokenizer(), rows, size) for size in (1, 16))
    assert [a.score for a in together] == pytest.approx([a.score for a in alone], rel=1e-4, abs=1e-6)
    assert len({round(a.score, 6) for a in alone}) > 4
    assert launch.reference_scores(base, word_tokenizer(), ["", ""]) == [], "nothing to go on from"
