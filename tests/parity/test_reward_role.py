"""The reward role gives the numbers of the model that TRL's RewardTrainer trained, or says why it cannot."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import RewardConfig, RewardTrainer

from tests.helpers import DEVICE, QUIET
from tests.parity import tiny
from tests.parity.test_roles import close
from trl_ext import SharedBase

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def pairs(rows: int = 8) -> Dataset:
    """Preferences between random words, of different lengths."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(f"w{draw.randrange(3, tiny.VOCABULARY)}" for _ in range(draw.randrange(1, 6)))

    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{column: " " + words() for column in columns} for _ in range(rows)])


def train_reward(base_folder: Path, folder: Path, **model_kwargs: Any) -> RewardTrainer:
    """Two steps of TRL's RewardTrainer with LoRA, saved into `folder`."""
    args = RewardConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        disable_tqdm=True,
        # There TRL keeps what it trains in bfloat16.
        **{**QUIET, "bf16": "quantization_config" in model_kwargs},
    )
    trainer = RewardTrainer(
        model=str(base_folder),
        args=args,
        train_dataset=pairs(),
        peft_config=LoraConfig(task_type="SEQ_CLS", **tiny.LORA),
        **model_kwargs,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer


def texts(trainer: RewardTrainer) -> tuple[Tensor, Tensor]:
    """Ids and mask, right-padded, of what the trainer itself reads: prompt and answer with an EOS."""
    chosen = [row["chosen_ids"] for row in trainer.train_dataset]
    padded = trainer.processing_class.pad({"input_ids": chosen}, return_tensors="pt", padding_side="right")
    return padded["input_ids"].to(DEVICE), padded["attention_mask"].to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS])
def test_without_a_tokenizer_padding_is_that_of_the_bases_config(pad: int, tmp_path: Path) -> None:
    """By it a classifier of PEFT's goes: where padding is EOS, it reads the token before the EOS."""
    config = tiny.config_of("qwen2")
    config.pad_token_id = pad
    base = tiny.save_base(tmp_path / "base", config)
    with torch.enable_grad():
        tiny.save_reward_adapter(tmp_path / "reward", base, seed=3)
    ids, mask = torch.tensor([[5, 6, 7, 8, 1], [5, 9, 1, pad, pad]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "reward"
    ).eval()
    expected = plain(input_ids=ids, attention_mask=mask).logits[:, 0]
    roles = SharedBase.from_pretrained(str(base), policy=tiny.new_lora(), reward=tmp_path / "reward").eval()
    close(roles.scores(ids.to(DEVICE), mask.to(DEVICE)), expected)


@torch.no_grad()
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_scores_are_those_of_the_reward_trainer(family: str, pad: str, tmp_path: Path) -> None:
    """Also where padding is EOS: the model then reads the token before the EOS."""
    base_folder = tiny.save_base(tmp_path / "base", tiny.config_of(family), pad=pad)
    with torch.enable_grad():
        trainer = train_reward(base_folder, tmp_path / "reward")
    ids, mask = texts(trainer)
    last = mask.sum(dim=1) - 1
    assert (ids[range(len(ids)), last] == tiny.EOS).all() and len(set(last.tolist())) > 1
    assert trainer.processing_class.pad_token == pad
    expected = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert expected.std() > 1e-2

    base = SharedBase.from_pretrained(str(base_folder), policy=tiny.new_lora(), reward=tmp_path / "reward").eval()
    close(base.scores(ids, mask), expected)
    close(base.score_pass(ids, mask, 1).scores, expected)
    # As a value role it starts from the same trunk and head.
    value = SharedBase.from_pretrained(str(base_folder), policy=tiny.new_lora(), value=tmp_path / "reward").eval()
    whole = tiny.Padded(ids, mask, ids.shape[1] - 1)
    close(value.values(*whole.args), tiny.plain_values(trainer.model, whole))
    # Nothing is lost by saving it again.
    base.save_pretrained(tmp_path / "again")
    again = SharedBase.from_pretrained(
        str(base_folder), policy=tmp_path / "again/policy", reward=tmp_path / "again/reward"
    ).eval()
    close(again.scores(ids, mask), expected)
    # Left padding, and padding with other ids, are told by the mask.
    left = torch.stack([torch.cat([row[n + 1 :], row[: n + 1]]) for row, n in zip(ids, last, strict=True)])
    left_mask = mask.flip(1)
    close(base.scores(left.masked_fill(left_mask == 0, 7), left_mask), expected)


@torch.no_grad()
def test_where_the_score_is_read(tmp_path: Path) -> None:
    """Several EOS at the end are all skipped where EOS is padding; a row of nothing else is read at its end."""
    base_folder = tiny.save_base(tmp_path / "base", tiny.config_of("llama"), pad="<eos>")
    reward = tiny.save_reward_adapter(tmp_path / "reward", base_folder, seed=1)
    rows = [[5, 6, 7, 1, 1], [5, 6, 1, 7, 1], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    batch = torch.tensor(rows, device=DEVICE)
    mask = batch.ne(tiny.PAD).long()
    read_at = [2, 3, 4, 4, 2]

    def scores() -> tuple[Tensor, Tensor]:
        base = SharedBase.from_pretrained(str(base_folder), policy=tiny.new_lora(), reward=reward).eval()
        every = torch.stack([base.scores(batch[:, : n + 1], mask[:, : n + 1]) for n in range(5)], dim=1)
        return base.scores(batch, mask), every

    without_tokenizer, every = scores()
    close(without_tokenizer, every[:, -1])
    tiny.make_tokenizer(pad="<eos>").save_pretrained(reward)
    with_tokenizer, _ = scores()
    close(with_tokenizer, every[range(5), read_at])
    assert (with_tokenizer - without_tokenizer)[:2].abs().min() > 1e-3
    classifier = tiny.load_classifier(reward, base_folder)
    classifier.config.pad_token_id = tiny.EOS
    close(with_tokenizer[:3], classifier(batch[:3], attention_mask=mask[:3]).logits.squeeze(-1))


@torch.no_grad()
def test_a_reward_model_with_its_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As LLaMA-Factory saves it: a causal LM's adapter, and `v_head` beside it. Its score is read at the last token."""
    base_folder = str(tiny.save_base(tmp_path / "base", tiny.config_of("llama"), pad="<eos>"))
    folder = tmp_path / "reward"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder).to(DEVICE), tiny.new_lora()).eval()
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        parameter.normal_(std=0.2)
    head = torch.nn.Linear(model.config.hidden_size, 1, device=DEVICE)
    model.save_pretrained(folder)
    save_file(
        {f"v_head.summary.{key}": tensor.cpu() for key, tensor in head.state_dict().items()},
        folder / "value_head.safetensors",
    )
    tiny.make_tokenizer(pad="<eos>").save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]], device=DEVICE)
    mask = ids.ne(tiny.PAD).long()
    hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = head(hidden[[0, 1], [3, 2]]).squeeze(-1)

    base = SharedBase.from_pretrained(base_folder, policy=tiny.new_lora(), reward=folder).eval()
    close(base.scores(ids, mask), expected)
    # LLaMA-Factory's PPO policy has its value head in the same file; the value role is both, whatever the policy is.
    for policy in (folder, tiny.new_lora()):
        value = SharedBase.from_pretrained(base_folder, policy=policy, value=folder).eval()
        close(value.values(ids, mask, 3)[0], head(hidden[0, :3]).squeeze(-1))
    (folder / "value_head.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no score head"):
        SharedBase.from_pretrained(base_folder, policy=tiny.new_lora(), reward=folder)


@torch.no_grad()
def test_scores_over_a_quantised_base(llama: tiny.Home, tmp_path: Path) -> None:
    """Over the same NF4 base: the numbers of a quantised sequence classifier with what RewardTrainer saved."""
    with torch.enable_grad():
        trainer = train_reward(llama.base_folder, tmp_path, quantization_config=NF4)
    ids, mask = texts(trainer)
    alone = AutoModelForSequenceClassification.from_pretrained(
        llama.base_folder, num_labels=1, quantization_config=NF4, dtype=torch.float32
    )
    alone = PeftModel.from_pretrained(alone, tmp_path).eval()
    for module in alone.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()  # or some CPUs repack it for inference, for which these layers are too small
    base = SharedBase.from_pretrained(
        str(llama.base_folder),
        quantization_config=NF4,
        policy=tiny.new_lora(),
        reward=tmp_path,
        dtype=torch.float32,
    ).eval()
    expected = alone(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    close(base.scores(ids, mask), expected)
    close(base.score_pass(ids, mask, 1).scores, expected)
    with pytest.warns(UserWarning, match="over a quantised base"):
        plain = load(llama, tmp_path).eval()
    assert (plain.scores(ids, mask) - expected).abs().max() > 1e-3, "that is what the warning is about"


@torch.no_grad()
def test_the_bias_of_a_score_head_is_read(llama: tiny.Home, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(llama.base_folder, num_labels=1)
    classifier.score = torch.nn.Linear(32, 1)
    alone = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", **tiny.LORA)).eval()
    tiny.randomise(alone, seed=1)
    for name, parameter in alone.named_parameters():
        if name.endswith("score.modules_to_save.default.bias"):
            parameter.fill_(3.0)
    alone.save_pretrained(tmp_path / "reward")
    batch = tiny.padded_batch()
    scores, values = tiny.plain_scores(alone, batch), tiny.plain_values(alone, batch)
    assert scores.mean() > 1

    roles = {"value": tmp_path / "reward", "reward": tmp_path / "reward"}
    for folder in ("first", "second"):
        base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(), **roles).eval()
        close(base.scores(batch.ids, batch.mask), scores)
        close(base.values(*batch.args), values)
        assert len(base.trainable_parameters("value")) == 2 * 14 + 2  # 14 layers of a pair; a head of two
        base.save_pretrained(tmp_path / folder)
        roles = {role: tmp_path / folder / role for role in roles}
    base.save_roles(tmp_path / "checkpoint", "")
    for parameter in base.heads["value"].parameters():
        parameter.zero_()
    base.load_trained_roles(tmp_path / "checkpoint")
    close(base.values(*batch.args), values)


# Refusals ------------------------------------------------------------------------------------------------------------


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


def load(home: tiny.Home, reward: Path) -> SharedBase:
    return SharedBase.from_pretrained(str(home.base_folder), policy=tiny.new_lora(), reward=reward)


def test_reward_of_another_folder_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", tiny.config_of("llama"), seed=9)
    reward = tiny.save_reward_adapter(tmp_path / "reward", other, seed=1)
    with pytest.raises(ValueError) as error:
        load(llama, reward)
    assert str(other) in one_sentence(error) and "train it over this base" in str(error.value)


@pytest.mark.parametrize("family,hidden", [("llama", 64), ("gpt2", 32)])
def test_reward_of_other_shapes_is_refused(llama: tiny.Home, tmp_path: Path, family: str, hidden: int) -> None:
    """Also where its config claims this base."""
    other = tiny.save_base(tmp_path / "other", tiny.config_of(family, hidden=hidden))
    reward = tiny.save_reward_adapter(tmp_path / "reward", other, seed=1)
    edit(reward / "adapter_config.json", base_model_name_or_path=str(llama.base_folder))
    with pytest.raises(ValueError) as error:
        load(llama, reward)
    assert "does not fit" in one_sentence(error) and "train it over this base" in str(error.value)


def test_reward_with_another_tokenizer_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    reward = shutil.copytree(llama.reward_folder, tmp_path / "reward")
    tiny.make_tokenizer().save_pretrained(reward)
    load(llama, reward)
    file = reward / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {"w5": 6, "w6": 5}
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load(llama, reward)
    assert "another tokenizer" in one_sentence(error)


def test_reward_without_one_number_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    two = tiny.save_reward_adapter(tmp_path / "two", llama.base_folder, seed=1, num_labels=2)
    with pytest.raises(ValueError, match="score head with 2 outputs"):
        load(llama, two)
    with pytest.raises(ValueError, match="no score head"):
        load(llama, llama.reference_folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(llama, tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no adapter_config"):
        load(llama, llama.base_folder)


def test_reward_over_a_base_quantised_otherwise_warns(llama: tiny.Home, tmp_path: Path) -> None:
    """TRL keeps adapters in bfloat16 over a quantised base; what is saved here says it outright."""
    train_reward(llama.base_folder, tmp_path / "nf4", quantization_config=NF4)
    train_reward(llama.base_folder, tmp_path / "plain")

    def over_nf4(reward: Path) -> SharedBase:
        return SharedBase.from_pretrained(
            str(llama.base_folder), quantization_config=NF4, policy=tiny.new_lora(), reward=reward
        )

    advice = "Train the reward model over the base exactly as PPO loads it"
    with pytest.warns(UserWarning, match=f"over an unquantised base, and this base is quantised.*{advice}"):
        over_nf4(tmp_path / "plain")
    with pytest.warns(UserWarning, match=f"over a quantised base, and this base is not quantised.*{advice}"):
        load(llama, tmp_path / "nf4")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*quantised.*")
        load(llama, tmp_path / "plain").save_pretrained(tmp_path / "plain_again")
        over_nf4(tmp_path / "nf4").save_pretrained(tmp_path / "nf4_again")
        load(llama, tmp_path / "plain_again/reward")
        over_nf4(tmp_path / "nf4_again/reward")
        # A value adapter trained over a quantised base is float32 and still belongs there.
        SharedBase.from_pretrained(
            str(llama.base_folder), quantization_config=NF4, policy=tiny.new_lora(), value=tmp_path / "nf4_again/value"
        )
    with pytest.warns(UserWarning, match=advice):
        load(llama, tmp_path / "nf4_again/reward")
