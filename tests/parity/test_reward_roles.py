"""Several reward roles over one base: each says what its adapter says alone, on a model of its own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers import DEVICE
from tests.parity import tiny
from tests.parity.test_forward import forwards
from tests.parity.test_roles import close
from trl_ext import SharedBase
from trl_ext.core import uncertainty_weighted, worst_case

# Unlike in rank, in target modules and in padding: the last one reads a row that ends with EOS before it.
MEMBERS: tuple[dict[str, Any], ...] = (
    {"lora": {}, "pad": None},
    {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "pad": None},
    {"lora": {"r": 7, "lora_alpha": 3}, "pad": "<eos>"},
)
NAMES = ("reward_0", "reward_1", "reward_2")


def save_member(folder: Path, base: Path, seed: int, lora: dict[str, Any], pad: str | None) -> Path:
    """A random reward adapter as PEFT saves it, with a tokenizer beside it where `pad` names its padding."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", **{**tiny.LORA, **lora}))
    tiny.randomise(model, seed)
    model.save_pretrained(folder)
    if pad is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(llama: tiny.Home, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("members")
    return [save_member(folder / str(i), llama.base_folder, 10 + i, **member) for i, member in enumerate(MEMBERS)]


def load(home: tiny.Home, folders: list[Path], **changes: Any) -> SharedBase:
    return home.again(reward=folders, **changes).eval()


def rows() -> tiny.Padded:
    """Some of them end with EOS."""
    batch = tiny.padded_batch("right")
    last = batch.mask.sum(dim=1) - 1
    batch.ids[[0, 2], last[[0, 2]]] = tiny.EOS
    return batch


@torch.no_grad()
def alone(home: tiny.Home, folders: list[Path], batch: tiny.Padded) -> Tensor:
    """What each adapter says on a sequence classifier of its own, (rows, members)."""
    scores = []
    for folder, member in zip(folders, MEMBERS, strict=True):
        classifier = AutoModelForSequenceClassification.from_pretrained(home.base_folder, num_labels=1)
        classifier.config.pad_token_id = tiny.EOS if member["pad"] == "<eos>" else tiny.PAD
        model = PeftModel.from_pretrained(classifier, folder).eval()
        scores.append(
            torch.stack([row_score(model, ids, mask) for ids, mask in zip(batch.ids, batch.mask, strict=True)])
        )
    return torch.stack(scores, dim=1)


def row_score(model: PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Of one row without its padding, which a classifier would tell by id."""
    row = ids[mask.bool()].unsqueeze(0)
    return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, 0]


# What they say -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False], ids=["one forward", "one each"])
def test_each_says_what_its_adapter_says_alone(
    together: bool, llama: tiny.Home, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, base = rows(), load(llama, folders)
    expected = alone(llama, folders, batch)
    assert expected.std(dim=1).min() > 1e-2, "the members differ"
    monkeypatch.setattr("trl_ext.roles.adapted.MIXED_TOKENS", 10**9 if together else 0)
    with forwards(base) as counted:
        outputs = base(*batch.args, roles=("reference", "value", "reward"))
    assert counted == ([25] if together else [5] * 5)
    close(outputs["scores_by_role"], expected)
    close(outputs["scores"], expected.mean(dim=1))
    close(outputs["values"], llama.base.values(*batch.args))
    close(outputs["ref_logprobs"], llama.base.logprobs(*batch.args, role="reference"))
    pass_ = base.score_pass(*batch.args)
    close(pass_.scores, expected.mean(dim=1))
    close(base.scores(batch.ids, batch.mask), expected.mean(dim=1))
    for i, name in enumerate(NAMES):
        close(base.scores(batch.ids, batch.mask, role=name), expected[:, i])
        with base.use(name):
            close(base(*batch.args)["scores"], expected[:, i])


@torch.no_grad()
def test_all_read_what_the_template_writes_after_a_completion(llama: tiny.Home, folders: list[Path]) -> None:
    batch, base = rows(), load(llama, folders)
    where = torch.tensor([True, False, True, False, False], device=DEVICE)
    outputs = base(*batch.args, roles=("reward",), reward_suffix_ids=[7, 8], reward_suffix_rows=where)
    longer = [
        ids[mask.bool()].tolist() + [7, 8] * bool(w) for ids, mask, w in zip(batch.ids, batch.mask, where, strict=True)
    ]
    width = max(map(len, longer))
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in longer], device=DEVICE)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in longer], device=DEVICE)
    close(outputs["scores_by_role"], alone(llama, folders, tiny.Padded(ids, mask, 0)))


@torch.no_grad()
def test_the_base_combines_them_as_it_is_told(llama: tiny.Home, folders: list[Path]) -> None:
    batch, base = rows(), load(llama, folders)
    expected = alone(llama, folders, batch)
    base.combine_scores = worst_case
    close(base.scores(batch.ids, batch.mask), expected.min(dim=1).values)
    base.combine_scores = partial(uncertainty_weighted, coef=2.0)
    less = 2 * ((expected - expected.mean(dim=1, keepdim=True)) ** 2).mean(dim=1)
    close(base.scores(batch.ids, batch.mask), expected.mean(dim=1) - less)
    close(base.scores(batch.ids, batch.mask, role="reward_1"), expected[:, 1])


@torch.no_grad()
def test_over_a_model_in_memory(llama: tiny.Home, folders: list[Path]) -> None:
    batch = rows()
    model = tiny.AutoModelForCausalLM.from_pretrained(llama.base_folder)
    base = SharedBase.from_model(model, policy=tiny.new_lora(), reward=tuple(map(str, folders))).eval()
    close(base.scores(batch.ids, batch.mask), alone(llama, folders, batch).mean(dim=1))


# Names, memory, files ------------------------------------------------------------------------------------------------


def test_names_and_what_is_trained(llama: tiny.Home, folders: list[Path]) -> None:
    base = load(llama, folders)
    assert base.reward_roles == NAMES and base.has_role("reward") and base.has_role("reward_2")
    assert not base.has_role("reward_3")
    assert not any(p.requires_grad for name, p in base.named_parameters() if "reward" in name)
    one = load(llama, folders[:1])
    assert one.reward_roles == ("reward",) and one.adapters["reward"] == "reward"
    assert set(one.memory()) == set(llama.base.memory())
    assert SharedBase.from_pretrained(str(llama.base_folder)).reward_roles == ()


def test_memory_shows_each(llama: tiny.Home, folders: list[Path]) -> None:
    """Bytes of float32: LoRA on 4 + 3 layers of widths 32 and 64 (key and value: 16), twice."""
    sizes = load(llama, folders).memory()
    assert [sizes[f"{name}_head"] for name in NAMES] == [32 * 4] * 3
    shapes = {
        "q": (32, 32),
        "k": (32, 16),
        "v": (32, 16),
        "o": (32, 32),
        "gate": (32, 64),
        "up": (32, 64),
        "down": (64, 32),
    }
    every = 2 * sum(map(sum, shapes.values()))
    assert [sizes[name] for name in NAMES] == [4 * 4 * every, 4 * 2 * 2 * (64 + 96), 4 * 7 * every]
    without = SharedBase.from_pretrained(
        str(llama.base_folder),
        policy=llama.saved / "policy",
        value=llama.saved / "value",
        reference=llama.reference_folder,
    ).memory()
    more = sum(size for name, size in sizes.items() if name.startswith("reward"))
    assert sizes["total"] == without["total"] + more, "the base is there once"


@torch.no_grad()
def test_saved_and_loaded_again(llama: tiny.Home, folders: list[Path], tmp_path: Path) -> None:
    batch, base = rows(), load(llama, folders)
    expected = alone(llama, folders, batch)
    base.save_pretrained(tmp_path / "saved")
    base.save_roles(tmp_path / "checkpoint", "")
    for place in ("saved", "checkpoint"):
        own = sorted(path.name for path in (tmp_path / place).glob("reward*"))
        assert own == list(NAMES)
        saved = [tmp_path / place / name for name in own]
        again = load(llama, saved)
        close(again(*batch.args, roles=("reward",))["scores_by_role"], expected)
        note = json.loads((saved[2] / "trl_ext_role.json").read_text(encoding="utf-8"))
        assert note["pad_token_id"] == tiny.EOS
        close(load(llama, saved[1:2]).scores(batch.ids, batch.mask), expected[:, 1])


# Refusals ------------------------------------------------------------------------------------------------------------


def test_the_one_that_belongs_to_another_base_is_named(llama: tiny.Home, folders: list[Path], tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", tiny.config_of("llama"), seed=9)
    stranger = tiny.save_reward_adapter(tmp_path / "stranger", other, seed=1)
    with pytest.raises(ValueError) as error:
        load(llama, [folders[0], stranger, folders[1]])
    assert str(error.value).startswith(f"The reward adapter in {str(stranger)!r} was trained over {str(other)!r}")


def test_refusals_are_one_sentence(llama: tiny.Home, folders: list[Path], tmp_path: Path) -> None:
    base = load(llama, folders)
    with pytest.raises(ValueError, match="has 3 reward roles: choose one of reward_0, reward_1, reward_2"):
        base.use("reward").__enter__()
    with pytest.raises(ValueError, match="Unknown role 'reward_3': choose one of policy, reference, value"):
        base.scores(*rows().args[:2], role="reward_3")
    with pytest.raises(ValueError, match="reads one reward model, and this base has 3 reward roles: build it"):
        base.as_trl_models()
    with pytest.raises(ValueError, match="reward is an empty list: give at least one folder"):
        load(llama, [])
    base.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"one folder a role: give \['.*/reward_0', '.*_1', '.*/reward_2'\]"):
        load(llama, [tmp_path])
