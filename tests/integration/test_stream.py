"""Prompts from a stream: what a list of the same rows gives, without knowing them beforehand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor

from tests.helpers import CHAT_TEMPLATE, QUIET, prompt_dataset, saved_model, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.ppo.stream import PromptStream

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SEEN: list[list[str]] = []


def judge(prompts: list[str], completions: list[str], animal: list[str], **_: Any) -> list[float]:
    """Short answers that say the animal of the row."""
    SEEN.append(prompts)
    return [text.split().count(one) - 0.1 * len(text) for text, one in zip(completions, animal, strict=True)]


def rows(count: int = 30) -> list[dict[str, Any]]:
    """Of different prompts."""
    words = ["the", "cat", "dog", "bird", "sat"]
    texts = [f"{words[i % 5]} {words[i // 5 % 5]} {words[i // 25 % 5]}" for i in range(count)]
    return [{"prompt": text, "animal": words[1 + i % 3]} for i, text in enumerate(texts)]


def stream_of(given: list[dict[str, Any]]) -> IterableDataset:
    """Read one by one, of columns that nobody knows."""
    return IterableDataset.from_generator(lambda: iter(given))


def trainer_for(folder: Path, prompts: Any, **settings: Any) -> PPOTrainer:
    SEEN.clear()
    kwargs: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "total_episodes": 24,  # three rollouts of eight, two steps each
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "missing_eos_penalty": 0.3,
        **QUIET,
        **settings,
    }
    if not (folder / "model").exists():
        saved_model(folder / "model")
    args = PPOConfig(str(folder / "out"), **kwargs)
    return PPOTrainer(str(folder / "model"), judge, args, prompts, None, word_tokenizer(), peft_config=LORA)


def trained(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.base.named_parameters() if p.requires_grad}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("generations", [1, 2])
def test_a_stream_is_a_list_of_its_rows(generations: int, tmp_path: Path) -> None:
    settings = {"num_generations": generations}
    listed = trainer_for(tmp_path, Dataset.from_list(rows()), shuffle_dataset=False, **settings)
    listed.train()
    seen = list(SEEN)
    streamed = trainer_for(tmp_path, stream_of(rows()), **settings)
    streamed.train()
    assert seen == SEEN and [text for prompts in seen for text in prompts][:2] == (
        ["the the the", "cat the the"] if generations == 1 else ["the the the"] * 2
    )
    assert streamed.state.global_step == 6
    assert_same(trained(streamed), trained(listed))


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_from_a_shuffled_stream_goes_on_exactly(step: int, tmp_path: Path) -> None:
    """Within a rollout, and between two; the stream begins again, in another order, within the third rollout."""

    def prompts() -> IterableDataset:
        return Dataset.from_list(rows(20)).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=5)

    settings = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 32, "score_normalization": "running"}
    settings["evidence"] = False  # the reward function would hear of some prompts twice
    whole = trainer_for(tmp_path, prompts(), **settings)
    whole.train()
    seen = [text for batch in SEEN for text in batch]
    assert sorted(seen[:20]) == sorted(row["prompt"] for row in rows(20))
    assert seen[20:] != seen[:12] and len(set(seen[20:])) == 12
    resumed = trainer_for(tmp_path, prompts(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert [text for batch in SEEN for text in batch] == seen[16:]
    assert_same(trained(resumed), trained(whole))


BAD = {
    "no prompt": ({"prompt": 7, "animal": "cat"}, r"The prompt in row 17 of train_dataset is 7: no "),
    "empty": ({"prompt": "", "animal": "cat"}, r"The prompt in row 17 of train_dataset has no tokens"),
    "long": (
        {"prompt": "cat " * 400, "animal": "cat"},
        r"The prompt in row 17 of train_dataset has 400 tokens and 5 may",
    ),
    "another kind": (
        {"prompt": [{"role": "user", "content": "cat"}], "animal": "cat"},
        r"The prompt in row 17 of train_dataset is .* of another kind than that in row 0",
    ),
    "no column": ({"prompt": "cat"}, r"Row 17 of train_dataset has no 'animal', which row 0 has"),
    "one more": (
        {"prompt": "cat", "animal": "cat", "hint": 1},
        r"Row 17 of train_dataset has 'hint', which row 0 lacks",
    ),
}


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_late_in_a_stream_is_named_after_a_checkpoint(what: str, tmp_path: Path) -> None:
    """Row 17 is in the third rollout, of which nothing is trained; the mended stream is gone on with."""
    row, sentence = BAD[what]
    given = rows()
    whole = trainer_for(tmp_path, stream_of(given))
    whole.train()
    broken = trainer_for(tmp_path, stream_of([*given[:17], row, *given[18:]]))
    with pytest.raises(ValueError, match=sentence) as caught:
        broken.train()
    step = broken.state.global_step
    assert step == 3, "the next rollout is read while the last minibatch of this one waits"
    checkpoint = tmp_path / "out" / f"checkpoint-{step}"
    assert any(str(checkpoint) in note for note in caught.value.__notes__)
    mended = trainer_for(tmp_path, stream_of(given))
    mended.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trained(mended), trained(whole))


def test_what_fails_to_read_late_saves_first(tmp_path: Path) -> None:
    def read() -> Any:
        yield from rows()[:17]
        raise ConnectionResetError("the hub went home")

    trainer = trainer_for(tmp_path, IterableDataset.from_generator(read))
    with pytest.raises(ConnectionResetError, match="the hub went home"):
        trainer.train()
    assert (tmp_path / "out" / f"checkpoint-{trainer.state.global_step}" / "trainer_state.json").is_file()


def test_conversations_and_a_reference_to_normalise_by(tmp_path: Path) -> None:
    chat = prompt_dataset(30, chat=True)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    args = PPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=8,
        max_steps=8,
        max_completion_length=4,
        score_normalization="reference",
        normalization_samples=12,
        eval_strategy="steps",
        eval_steps=4,
        **QUIET,
    )

    def longest(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(text[0]["content"])) for text in completions]

    stream = chat.to_iterable_dataset()
    held_out = {"few": stream.take(3), "more": chat.select(range(4))}
    model = saved_model(tmp_path / "model")
    trainer = PPOTrainer(model, longest, args, stream, held_out, tokenizer, peft_config=LORA)
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.collector.combination.moments.state_dict()
    assert [len(dataset) for dataset in trainer.eval_dataset.values()] == [3, 4]
    assert any("eval_few_objective/scores" in row for row in trainer.state.log_history)


ENDLESS = IterableDataset.from_generator(lambda: ({"prompt": "cat", "animal": "cat"} for _ in iter(int, 1)))


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        (stream_of(rows()), {"total_episodes": None}, "set total_episodes or max_steps"),
        (stream_of(rows()), {"dataloader_num_workers": 2}, "leave dataloader_num_workers at 0"),
        (stream_of([]), {}, "train_dataset is empty"),
        (stream_of(rows(5)), {}, "train_dataset has 5 prompts, but one rollout takes 8"),
        (stream_of([{"text": "cat"}] * 9), {}, r"has no 'prompt' column, only \['text'\]"),
        (stream_of([*rows(4), {"prompt": 7}, *rows(4)]), {}, "row 4 of train_dataset is 7"),
    ],
)
def test_what_is_wrong_at_once(prompts: Any, settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        trainer_for(tmp_path, prompts, **settings)


def test_a_stream_that_can_be_read_once(tmp_path: Path) -> None:
    once = iter(rows(6))
    args = PPOConfig(str(tmp_path), total_episodes=16, per_device_train_batch_size=4, **QUIET)
    prompts = PromptStream(IterableDataset.from_generator(lambda: once), args)
    assert [prompts[i] for i in range(6)] == rows(6)
    with pytest.raises(
        ValueError, match=r"^train_dataset gave 6 prompts and none when it was read again, .* takes 16:"
    ):
        prompts[6]


def test_an_evaluation_that_would_never_end(tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), total_episodes=8, per_device_train_batch_size=8, **QUIET)
    with pytest.raises(ValueError, match=r"more than 10,000 rows: say how many, as in stream.take\(256\)"):
        PPOTrainer(saved_model(tmp_path / "model"), judge, args, stream_of(rows()), ENDLESS, word_tokenizer())
