"""Wherever a model is named, an adapter over one may be: training starts there, and a frozen copy is the reference.

Expected values are those of a plain PeftModel over the plain base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from tests.parity import tiny
from tests.parity.test_roles import close
from trl_ext import SharedBase
from trl_ext.roles import adapters as files


def plain(folder: Path, base: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def by_name(folder: Path, base: Path) -> SharedBase:
    return SharedBase.from_pretrained(str(folder))


def as_policy(folder: Path, base: Path) -> SharedBase:
    return SharedBase.from_pretrained(str(base), policy=folder, reference="copy")


def injected(folder: Path, base: Path) -> SharedBase:
    """Transformers itself puts the adapter into the model."""
    return SharedBase.from_model(AutoModelForCausalLM.from_pretrained(folder))


def in_peft(folder: Path, base: Path) -> SharedBase:
    return SharedBase.from_model(plain(folder, base))


def as_policy_of_a_model(folder: Path, base: Path) -> SharedBase:
    return SharedBase.from_model(AutoModelForCausalLM.from_pretrained(base), policy=str(folder), reference="copy")


WAYS = (by_name, as_policy, injected, in_peft, as_policy_of_a_model)


@pytest.mark.parametrize("build", WAYS)
def test_training_starts_at_the_adapter_and_a_frozen_copy_is_the_reference(
    build: Callable[[Path, Path], SharedBase], llama: tiny.Home, tmp_path: Path
) -> None:
    batch = tiny.padded_batch()
    with torch.no_grad():
        expected = tiny.plain_logprobs(plain(llama.reference_folder, llama.base_folder), batch)
        bare = tiny.plain_logprobs(AutoModelForCausalLM.from_pretrained(llama.base_folder).eval(), batch)
    assert (expected - bare).abs().max() > 0.01
    base = build(llama.reference_folder, llama.base_folder).eval()
    trains = base.trainable_parameters("policy")
    assert trains and all(parameter.requires_grad for parameter in trains)
    with torch.no_grad():
        for role in ("policy", "reference"):
            close(base.logprobs(*batch.args, role=role), expected)
    base.logprobs(*batch.args).sum().backward()
    assert all(parameter.grad is not None for parameter in trains)
    with torch.no_grad():
        for parameter in trains:
            parameter.zero_()
        close(base.logprobs(*batch.args), bare)
        close(base.logprobs(*batch.args, role="reference"), expected)
    base.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "policy" / files.CONFIG).read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == str(llama.base_folder)
    close(tiny.plain_logprobs(plain(tmp_path / "reference", llama.base_folder), batch).detach(), expected)


@torch.no_grad()
def test_a_new_policy_has_nothing_to_copy(llama: tiny.Home) -> None:
    with pytest.raises(ValueError, match="the policy starts from none"):
        SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(), reference="copy")


@torch.no_grad()
def test_the_bare_base_is_the_reference_where_it_is_asked_for(llama: tiny.Home) -> None:
    batch = tiny.padded_batch()
    bare = tiny.plain_logprobs(AutoModelForCausalLM.from_pretrained(llama.base_folder).eval(), batch)
    for base in (
        SharedBase.from_pretrained(str(llama.reference_folder), reference="base").eval(),
        SharedBase.from_pretrained(str(llama.base_folder), policy=llama.reference_folder).eval(),
        SharedBase.from_model(plain(llama.reference_folder, llama.base_folder), reference="base").eval(),
    ):
        assert base.adapters["reference"] is None
        close(base.logprobs(*batch.args, role="reference"), bare)


@torch.no_grad()
def test_the_folder_of_a_run_is_an_adapter_too(llama: tiny.Home, tmp_path: Path) -> None:
    """A trainer saves the policy into output_dir itself, and other roles below."""
    llama.base.save_roles(tmp_path, policy_folder="")
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(str(tmp_path), value=tmp_path / "value").eval()
    expected = tiny.plain_logprobs(plain(tmp_path, llama.base_folder), batch)
    close(base.logprobs(*batch.args), expected)
    close(base.logprobs(*batch.args, role="reference"), expected)
    close(base.values(*batch.args), llama.base.values(*batch.args))


def in_the_cache(cache: Path, name: str, folder: Path) -> None:
    """`folder` as the Hub's client keeps what it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / "a1b2c3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1b2c3")


@torch.no_grad()
def test_an_adapter_on_the_hub(llama: tiny.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_cache(tmp_path, "me/sft", llama.reference_folder)
    batch = tiny.padded_batch()
    expected = tiny.plain_logprobs(plain(llama.reference_folder, llama.base_folder), batch)
    base = SharedBase.from_pretrained("me/sft", cache_dir=tmp_path, local_files_only=True).eval()
    close(base.logprobs(*batch.args), expected)
    close(base.logprobs(*batch.args, role="reference"), expected)
    in_cache = files.snapshot_download
    monkeypatch.setattr(
        files, "snapshot_download", lambda name, **how: in_cache(name, cache_dir=tmp_path, local_files_only=True, **how)
    )
    base = SharedBase.from_pretrained(str(llama.base_folder), policy="me/sft").eval()
    close(base.logprobs(*batch.args), expected)
    with pytest.raises(FileNotFoundError, match=r"The reward role's folder 'me/judge' does not exist, and there is no"):
        SharedBase.from_pretrained(str(llama.base_folder), reward="me/judge")


def changed(folder: Path, copy: Path, **config: object) -> str:
    shutil.copytree(folder, copy)
    given = json.loads((copy / files.CONFIG).read_text(encoding="utf-8"))
    (copy / files.CONFIG).write_text(json.dumps({**given, **config}), encoding="utf-8")
    return str(copy)


def test_what_cannot_be_used_is_refused(llama: tiny.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft, base = llama.reference_folder, llama.base_folder
    loaded = AutoModelForCausalLM.from_pretrained(sft)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded
    both = shutil.copytree(base, tmp_path / "both")
    for file in sft.iterdir():
        if file.name.startswith("adapter_"):
            shutil.copy(file, both / file.name)
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"is an adapter over '.*base', and a policy was given too", lambda: by_name_with(sft, LoraConfig())),
        (r"is an adapter over '.*base', and a policy was given too", lambda: by_name_with(sft, str(sft))),
        (r"loaded with an adapter already, and a policy", lambda: SharedBase.from_model(loaded, policy=LoraConfig())),
        (r"has modules_to_save=\['score'\]", lambda: by_name(llama.saved / "value", base)),
        (
            r"does not say over which model it was trained",
            lambda: SharedBase.from_pretrained(changed(sft, tmp_path / "untold", base_model_name_or_path=None)),
        ),
        (
            r"is an adapter over '.*', which is an adapter too: merge that one",
            lambda: SharedBase.from_pretrained(changed(sft, tmp_path / "stacked", base_model_name_or_path=str(sft))),
        ),
        (r"holds a model and an adapter beside it", lambda: SharedBase.from_pretrained(str(both))),
    ]
    for sentence, call in calls:
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(FileNotFoundError, match=r"holds one folder a role: give '.*/saved/policy'"):
        as_policy(llama.saved, base)


def by_name_with(folder: Path, policy: object) -> SharedBase:
    return SharedBase.from_pretrained(str(folder), policy=policy)  # type: ignore[arg-type]


@torch.no_grad()
def test_inside_use_whoever_is_not_named_is_the_role_of_use(llama: tiny.Home) -> None:
    batch = tiny.padded_batch()
    policy = tiny.plain_logprobs(tiny.load_policy(llama.saved / "policy").eval(), batch)
    reference = tiny.plain_logprobs(tiny.load_policy(llama.reference_folder).eval(), batch)
    base = llama.base
    with base.use("reference"):
        close(base.logprobs(*batch.args), reference)
        close(base(*batch.args)["ref_logprobs"], reference)
        close(base.logprobs(*batch.args, role="policy"), policy)
        with base.use("policy"):
            close(base.logprobs(*batch.args), policy)
        close(base.logprobs(*batch.args), reference)
    close(base.logprobs(*batch.args), policy)
    with pytest.raises(RuntimeError, match="mine"), base.use("reference"):
        raise RuntimeError("mine")
    close(base.logprobs(*batch.args), policy)
    how = {"input_ids": batch.ids[:, :5], "max_new_tokens": 6, "do_sample": False}
    written = base.generate(role="reference", **how)
    assert not torch.equal(written, base.generate(**how)), "the example shows nothing"
    with base.use("reference"):
        assert torch.equal(base.generate(**how), written)


def test_the_tokenizer_is_of_the_revision_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But an adapter's own, which lies in its folder, has none."""
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(files.AutoTokenizer, "from_pretrained", lambda name, **how: asked.append((name, how)))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for named in (files.Named("org/m", revision="v1"), files.Named("org/m"), files.Named("org/m", tmp_path, "v1")):
        named.load_tokenizer(trust_remote_code=True)
    of_base = [("org/m", "v1"), ("org/m", "main")]
    assert [(name, how["revision"]) for name, how in asked] == [*of_base, (str(tmp_path), "main")]
    assert all(how["trust_remote_code"] for _, how in asked)


def test_a_saved_role_names_the_revision_that_it_was_trained_over(llama: tiny.Home, tmp_path: Path) -> None:
    """Whoever loads it again gets that base, and not the newest."""
    for revision, named in (("step1000", "step1000"), ("main", None)):
        base = SharedBase.from_pretrained(str(llama.base_folder), revision=revision)
        base.save_roles(tmp_path / revision, "policy")
        for role in ("policy", "value"):
            assert files.read_config(tmp_path / revision / role)["revision"] == named
    assert files.named(str(tmp_path / "step1000" / "policy")).revision == "step1000"
