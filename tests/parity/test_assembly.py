"""Roles are laid on the base as they were asked for: which adapters there are, what trains, what is said where not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers import DEVICE
from tests.parity import tiny
from tests.parity.test_roles import close
from trl_ext import SharedBase
from trl_ext.roles import adapters as files


def copied_with(folder: Path, copy: Path, **changes: object) -> Path:
    """A copy of an adapter's folder with other words in its configuration."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / files.CONFIG).read_text(encoding="utf-8"))
    (copy / files.CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return copy


def test_each_role_has_its_adapter_and_nothing_else_is_there(llama: tiny.Home) -> None:
    base = llama.again()
    assert set(base.model.peft_config) == {"policy", "value", "reward", "reference"}
    assert base.adapters == {name: name for name in ("policy", "value", "reward", "reference")}
    assert isinstance(base.model, PeftModelForCausalLM)
    trains = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    matrices = {name for name, _ in base.named_parameters() if ".policy." in name or ".value." in name}
    assert trains == matrices | {"heads.value.weight"}
    for config in base.model.peft_config.values():
        assert not config.inference_mode  # PEFT freezes an adapter of which this says so


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_policy_writes_text_whatever_its_config_says(task_type: str | None, llama: tiny.Home, tmp_path: Path) -> None:
    folder = copied_with(llama.saved / "policy", tmp_path / "untold", task_type=task_type)
    for policy in (str(folder), LoraConfig(r=2, task_type=task_type)):
        base = llama.again(policy=policy, value=str(llama.saved / "value"))
        assert isinstance(base.model, PeftModelForCausalLM)
        base.save_pretrained(tmp_path / "again")
        tiny.load_policy(tmp_path / "again" / "policy")


def test_an_adapter_that_names_no_base_is_taken(llama: tiny.Home, tmp_path: Path) -> None:
    folder = copied_with(llama.saved / "policy", tmp_path / "untold", base_model_name_or_path=None)
    llama.again(policy=folder)


def test_the_lora_config_that_is_given_stays_as_it_is(llama: tiny.Home) -> None:
    mine = tiny.new_lora()
    before = mine.to_dict()
    SharedBase.from_pretrained(str(llama.base_folder), policy=mine)
    assert mine.to_dict() == before


@pytest.mark.parametrize("target", ["lm_head", "model.lm_head", "embed_out"])
def test_lora_on_the_lm_head_is_refused(target: str, llama: tiny.Home) -> None:
    with pytest.raises(ValueError, match=r"targets the LM head.*: the adapter would never train; remove it"):
        SharedBase.from_pretrained(str(llama.base_folder), policy=LoraConfig(target_modules=["q_proj", target]))


def test_how_the_base_is_loaded(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[dict[str, Any]] = []
    plain = AutoModelForCausalLM.from_pretrained

    def noted(name: str, **how: Any) -> Any:
        loads.append(how)
        return plain(name, **how)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    name, four_bit = str(llama.base_folder), BitsAndBytesConfig(load_in_4bit=True)
    SharedBase.from_pretrained(name)
    SharedBase.from_pretrained(name, quantization_config=four_bit)
    SharedBase.from_pretrained(name, dtype=torch.float16, device_map={"": "cpu"}, attn_implementation="eager")
    assert loads == [
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16, "quantization_config": four_bit},
        {"dtype": torch.float16, "device_map": {"": "cpu"}, "attn_implementation": "eager"},
    ]


def test_a_head_is_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = files.scalar_head(3, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.weight.dtype == torch.float32 and head.bias is None and not head.weight.any()


@pytest.mark.parametrize(
    "loaded,quantized", [({}, False), ({"is_loaded_in_4bit": True}, True), ({"is_loaded_in_8bit": True}, True)]
)
def test_the_note_says_how_the_base_was_loaded(loaded: dict[str, bool], quantized: bool, tmp_path: Path) -> None:
    files.write_note(tmp_path, SimpleNamespace(**loaded), more=1)
    assert json.loads((tmp_path / files.NOTE).read_text()) == {"quantized": quantized, "more": 1}


def test_the_warning_names_the_folder(llama: tiny.Home, tmp_path: Path) -> None:
    folder = copied_with(llama.saved / "value", tmp_path / "over_nf4")
    (folder / files.NOTE).write_text(json.dumps({"quantized": True}))
    with pytest.warns(UserWarning) as warned:
        llama.again(value=folder)
    message = next(str(w.message) for w in warned if "quantised" in str(w.message))
    assert message.startswith(
        f"The value adapter in {str(folder)!r} was trained over a quantised base, and this base is"
    )


def test_an_adapter_that_does_not_fit_is_named_and_so_is_the_base(llama: tiny.Home, tmp_path: Path) -> None:
    wider = tiny.save_base(tmp_path / "wider", tiny.config_of("llama", hidden=64))
    base = str(llama.base_folder)
    for role in ("policy", "reference"):
        folder = tiny.save_policy_adapter(tmp_path / f"of_wider_{role}", wider, seed=1)
        folder = copied_with(folder, tmp_path / role, base_model_name_or_path=base)
        with pytest.raises(ValueError) as raised:
            SharedBase.from_pretrained(base, **{role: folder})
        assert str(raised.value).startswith(f"The adapter in {str(folder)!r} does not fit the base {base!r} (")
    with pytest.raises(ValueError) as raised:
        untold = copied_with(llama.saved / "policy", tmp_path / "elsewhere", target_modules=["nowhere"])
        SharedBase.from_pretrained(base, policy=untold)
    assert str(raised.value).startswith(f"The adapter in {str(untold)!r} does not fit the base {base!r} (")


@torch.no_grad()
def test_a_row_of_one_token_has_a_score(llama: tiny.Home) -> None:
    one = tiny.Padded(torch.tensor([[5]], device=DEVICE), torch.tensor([[1]], device=DEVICE), 1)
    classifier = tiny.load_classifier(llama.reward_folder, llama.base_folder)
    close(llama.base.scores(one.ids, one.mask), tiny.plain_scores(classifier, one))


def test_layers_of_4_bit_stay_in_training_mode(llama: tiny.Home) -> None:
    """In eval mode they forget how to go backwards on some machines."""
    model = AutoModelForCausalLM.from_pretrained(
        llama.base_folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    base = SharedBase.from_model(model)
    for mode in (False, True, False):
        base.train(mode)
        for module in base.modules():
            is_4bit = type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear4bit"
            assert module.training is (mode or is_4bit)
            if is_4bit:
                assert module.eval() is module and module.training
