"""Every field of LoraConfig and every other kind of adapter, in every role: what the adapter says alone in PEFT, or one
sentence that names the field. Never other numbers, never somebody else's error."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.parity import tiny
from tests.parity.test_roles import close, different
from trl_ext import SharedBase
from trl_ext.roles import sharing

ROLES = ("policy", "reference", "value", "reward")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "c_attn", "c_proj"]}


@dataclasses.dataclass(frozen=True)
class Right:
    """A configuration under which every role says what the adapter says alone.

    Attributes:
        made: arguments of the LoraConfig that the adapters are made with.
        said: what is changed in their adapter_config.json afterwards.
        base: which one.
    """

    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    said: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "qwen2"  # whose attention has biases


# What is done with each field of LoraConfig: the values that are right, and those that are refused.
ZOO: dict[str, tuple[list[Right], list[Any]]] = {
    "task_type": ([Right(said={"task_type": None})], []),
    "peft_type": ([Right(said={"peft_type": "LORA"})], []),  # others: below
    "auto_mapping": ([Right(said={"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}})], []),
    "peft_version": ([Right(said={"peft_version": "0.99"})], []),
    "base_model_name_or_path": ([Right(said={"base_model_name_or_path": None})], []),  # others: test_reward_role
    "revision": ([Right(said={"revision": "v2"})], []),
    "inference_mode": ([Right(said={"inference_mode": False})], []),
    "r": ([Right({"r": 3})], []),
    "target_modules": (
        [
            Right({"target_modules": "all-linear"}),
            Right({"target_modules": None}),
            Right({"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
            Right({"target_modules": r".*\.1\..*(v|gate)_proj"}),
            Right({"target_modules": ["embed_tokens", "v_proj"]}),
            Right({"target_modules": ["embed_tokens"]}, base="tied"),
            Right({"target_modules": ["embed_tokens", "o_proj"]}, base="gemma"),  # which scales its embeddings
            Right({"target_modules": ["wte", "c_attn"]}, base="gpt2"),
        ],
        [["lm_head"], ["q_proj", "model.lm_head"], r".*(q_proj|lm_head)", ["embed_out"]],
    ),
    "exclude_modules": ([Right({"exclude_modules": ["down_proj"]}), Right({"exclude_modules": ".*mlp.*"})], []),
    "lora_alpha": ([Right({"lora_alpha": 5})], []),
    "lora_dropout": ([Right({"lora_dropout": 0.5})], []),
    "fan_in_fan_out": ([Right({"fan_in_fan_out": True}), Right({"fan_in_fan_out": True}, base="gpt2")], []),
    "bias": ([], ["all", "lora_only"]),
    "use_rslora": ([Right({"use_rslora": True})], []),
    "modules_to_save": ([], [["embed_tokens"], ["lm_head"], ["score", "norm"]]),
    "init_lora_weights": (
        [
            Right({"init_lora_weights": False}),
            Right({"init_lora_weights": "gaussian"}),
            Right({"init_lora_weights": "orthogonal"}),
            Right(said={"init_lora_weights": "eva"}),
        ],
        ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "of tomorrow"],
    ),
    "layers_to_transform": ([Right({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]})], []),
    "layers_pattern": (
        [Right({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"})],
        [],
    ),
    "rank_pattern": ([Right({"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}})], []),
    "alpha_pattern": ([Right({"alpha_pattern": {"q_proj": 32}})], []),
    "megatron_config": ([], [{"hidden_size": 32}]),
    "megatron_core": ([Right(said={"megatron_core": "other.core"})], []),
    "trainable_token_indices": ([], [[3], {"embed_tokens": [3]}]),
    "loftq_config": ([Right(said={"loftq_config": {"loftq_bits": 8}})], []),
    "eva_config": ([Right(said={"eva_config": {"rho": 1.0}})], []),
    "corda_config": ([Right(said={"corda_config": {"prune_temporary_fields": True}})], []),
    "lora_ga_config": ([Right(said={"lora_ga_config": {"stable_gamma": 8}})], []),
    "use_dora": ([Right({"use_dora": True}), Right({"use_dora": True}, base="gpt2")], []),
    "velora_config": ([], [{"num_groups": 2}]),
    "alora_invocation_tokens": ([], [[5, 6]]),
    "use_qalora": ([], [True]),
    "qalora_group_size": ([Right(said={"qalora_group_size": 8})], []),
    "monteclora_config": ([], [{"num_samples": 2}]),
    "layer_replication": ([], [[[0, 2], [0, 2]]]),
    "runtime_config": ([], [{"ephemeral_gpu_offload": True}]),
    "lora_bias": ([Right({"lora_bias": True}), Right({"lora_bias": True}, base="gpt2")], []),
    "target_parameters": ([Right({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]})], []),
    "use_bdlora": ([], [{"target_modules_bd_a": ["q_proj"], "nblocks": 2}]),
    "arrow_config": ([], [{"top_k": 1}]),
    "kasa_config": ([], [{"beta": 0.1}]),
    "ensure_weight_tying": ([], [True]),
}
RIGHT = [pytest.param(case, id=f"{field}-{n}") for field, (cases, _) in ZOO.items() for n, case in enumerate(cases)]
REFUSED = [(field, value) for field, (_, values) in ZOO.items() for value in values]


class Bases:
    """Random models, made when asked for: their folders, and copies of them in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[tuple[str, Any], Any] = {}

    def __getitem__(self, name: str) -> Path:
        family, tied = ("qwen2", True) if name == "tied" else (name, False)
        if not (self.folder / name).is_dir():
            tiny.save_base(self.folder / name, tiny.config_of(family, tied))
        return self.folder / name

    def copy(self, name: str, kind: Any = AutoModelForCausalLM) -> Any:
        if (name, kind) not in self._models:
            labels = {} if kind is AutoModelForCausalLM else {"num_labels": 1}
            self._models[name, kind] = kind.from_pretrained(self[name], **labels)
        return copy.deepcopy(self._models[name, kind])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def plain(bases: Bases) -> dict[str, Path]:
    """The folders of ordinary adapters, one for each role."""
    folder = bases.folder / "plain"
    make(Right(), bases, folder)
    return {role: folder / role for role in ROLES}


@torch.no_grad()
def make(case: Right, bases: Bases, folder: Path) -> dict[str, Tensor]:
    """Save a random adapter for each role as PEFT does, and return what each says alone."""
    expected = {}
    for task, kind, roles in (
        ("CAUSAL_LM", AutoModelForCausalLM, ROLES[:2]),
        ("SEQ_CLS", AutoModelForSequenceClassification, ROLES[2:]),
    ):
        config = LoraConfig(task_type=task, **{**LORA, **case.made})
        model = get_peft_model(bases.copy(case.base, kind), config).eval()
        for role in roles:
            tiny.randomise(model, seed=ROLES.index(role))
            model.save_pretrained(folder / role)
            say(folder / role, **case.said)
            expected[role] = of_plain(role, model)
    return expected


def say(folder: Path, **said: Any) -> Path:
    """Change what the configuration of an adapter says."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    return folder


def of_plain(role: str, model: torch.nn.Module) -> Tensor:
    """What a model and its adapter say, in plain PEFT."""
    say_it = {"value": tiny.plain_values, "reward": tiny.plain_scores}.get(role, tiny.plain_logprobs)
    return say_it(model, tiny.padded_batch())


def alone(role: str, bases: Bases, base: str, folder: Path) -> PeftModel:
    """The adapter in `folder` alone in PEFT."""
    kind = AutoModelForSequenceClassification if role in ("value", "reward") else AutoModelForCausalLM
    return PeftModel.from_pretrained(bases.copy(base, kind), folder, is_trainable=True).eval()


@torch.no_grad()
def compare(base: SharedBase, expected: dict[str, Tensor]) -> None:
    """Each role against its adapter alone; in forwards of their own, and in one for all."""
    batch = tiny.padded_batch()
    together = base.eval().score_pass(*batch.args)
    for role, numbers in expected.items():
        if role in ("policy", "reference"):
            close(base.logprobs(*batch.args, role=role), numbers)  # type: ignore[arg-type]
        elif role == "value":
            close(base.values(*batch.args), numbers)
        else:
            close(base.scores(batch.ids, batch.mask), numbers)
    for role, numbers in zip(("reference", "value", "reward"), together, strict=True):
        if role in expected:
            close(numbers, expected[role])


def test_the_zoo_has_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not fields - set(ZOO), "new in PEFT: try each in every role, and say here which values are right"
    assert not set(ZOO) - fields, "no longer in PEFT"
    assert {field for field, (right, _) in ZOO.items() if right} == sharing.RIGHT


@pytest.mark.sampled(every=3)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of fan_in_fan_out, of tied weights, of configs that it ignores
@pytest.mark.parametrize("case", RIGHT)
def test_every_role_says_what_its_adapter_says_alone(case: Right, bases: Bases, tmp_path: Path) -> None:
    expected = make(case, bases, tmp_path)
    different(expected["policy"], expected["reference"])
    made, saved = ({role: folder / role for role in ROLES} for folder in (tmp_path, tmp_path / "saved"))
    base = SharedBase.from_model(bases.copy(case.base), **made)  # type: ignore[arg-type]
    compare(base, expected)
    base.save_pretrained(tmp_path / "saved")
    compare(SharedBase.from_model(bases.copy(case.base), **saved), expected)  # type: ignore[arg-type]

    # An adapter in memory, and a frozen copy of it.
    model = alone("policy", bases, case.base, tmp_path / "policy")
    compare(SharedBase.from_model(model), {"policy": expected["policy"], "reference": expected["policy"]})
    if case.said:
        return

    # A new policy, and a value role like it.
    config = LoraConfig(task_type="CAUSAL_LM", **{**LORA, **case.made})
    base = SharedBase.from_model(bases.copy(case.base), policy=config)
    tiny.randomise(base, seed=5, only=".policy")
    tiny.randomise(base, seed=6, only=".value")
    base.save_pretrained(tmp_path / "new")
    with torch.no_grad():
        roles = ("policy", "value")
        compare(base, {role: of_plain(role, alone(role, bases, case.base, tmp_path / "new" / role)) for role in roles})


def refused(act: Callable[[], Any], *parts: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        act()
    text = str(error.value)
    assert all(part in text for part in parts) and "\n" not in text and text.endswith(".") and len(text) < 400, text


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


def said_of(field: str, value: Any) -> list[str]:
    return ["targets the LM head"] if field == "target_modules" else [f"has {field}={value!r}", ":"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("role", ROLES)
def test_a_folder_is_refused_by_the_name_of_the_field(
    role: str, plain: dict[str, Path], bases: Bases, tmp_path: Path
) -> None:
    fields = [*REFUSED, ("field_of_tomorrow", 3)]
    if role in ("policy", "reference"):
        fields.append(("modules_to_save", ["score"]))
    for n, (field, value) in enumerate(fields):
        folder = say(shutil.copytree(plain[role], tmp_path / str(n)), **{field: value})
        refused(
            lambda: SharedBase.from_pretrained(str(bases["qwen2"]), **{role: folder}),  # noqa: B023 (called here)
            repr(str(folder)),
            *said_of(field, value),
        )


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_new_policy_is_refused_by_the_name_of_the_field(bases: Bases) -> None:
    for field, value in [*REFUSED, ("field_of_tomorrow", 3), ("init_lora_weights", "eva")]:
        config = tiny.new_lora()
        setattr(config, field, value)
        refused(lambda: SharedBase.from_pretrained(str(bases["qwen2"]), policy=config), *said_of(field, value))  # noqa: B023


def test_an_adapter_in_memory_is_refused_by_the_name_of_the_field(plain: dict[str, Path], bases: Bases) -> None:
    model = alone("policy", bases, "qwen2", plain["policy"])
    model.add_adapter("unused", tiny.new_lora())
    for name in ("default", "unused"):
        for field, value in [*REFUSED, ("field_of_tomorrow", 3)]:
            config = model.peft_config[name]
            before = getattr(config, field, None)
            setattr(config, field, value)
            refused(
                lambda: SharedBase.from_model(model),
                f"adapter {name!r}" if field != "target_modules" else "",
                *said_of(field, value),
            )
            setattr(config, field, before)
        del config.field_of_tomorrow
    SharedBase.from_model(model)


# Other kinds of adapters ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_no_other_kind_of_adapter_is_taken(kind: str, plain: dict[str, Path], bases: Bases, tmp_path: Path) -> None:
    for role in ROLES:
        folder = say(shutil.copytree(plain[role], tmp_path / role), peft_type=kind)
        refused(
            lambda: SharedBase.from_pretrained(str(bases["qwen2"]), **{role: folder}),  # noqa: B023
            f"{str(folder)!r} is of type {kind!r}: roles share a base through LoRA only",
        )


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["q_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
        LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_no_other_kind_is_taken_from_memory_or_as_a_config(config: PeftConfig, bases: Bases) -> None:
    base = bases["qwen2"]
    kind = "ADALORA" if isinstance(config, AdaLoraConfig) else type(config).__name__
    refused(lambda: SharedBase.from_pretrained(str(base), policy=config), kind)  # type: ignore[arg-type]
    model = get_peft_model(bases.copy("qwen2"), config)
    refused(lambda: SharedBase.from_model(model), f"is of type {config.peft_type.value!r}")  # type: ignore[union-attr]


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
        "base_model.model.model.norm.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_E",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_arrow.weight",
        "prompt_embeddings",
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_weights_that_are_not_lora_are_refused_by_key(
    key: str, plain: dict[str, Path], bases: Bases, tmp_path: Path
) -> None:
    for role in ROLES:
        folder = with_weights(plain[role], tmp_path / role, **{key: torch.ones(32)})
        refused(
            lambda: SharedBase.from_pretrained(str(bases["qwen2"]), **{role: folder}),  # noqa: B023
            f"{str(folder)!r} holds {key!r} among its weights, which is not LoRA",
        )


def with_weights(folder: Path, copy: Path, **more: torch.Tensor) -> Path:
    shutil.copytree(folder, copy)
    save_file({**load_file(folder / "adapter_model.safetensors"), **more}, copy / "adapter_model.safetensors")
    return copy


def test_an_embedding_of_its_own_is_refused_and_the_bases_is_not(
    plain: dict[str, Path], bases: Bases, tmp_path: Path
) -> None:
    """PEFT saves the embeddings beside an adapter where they were resized."""
    base = bases["qwen2"]
    key, own = "base_model.model.model.embed_tokens.weight", load_file(base / "model.safetensors")
    own_embedding = own["model.embed_tokens.weight"]
    for role in ROLES:
        same = with_weights(plain[role], tmp_path / f"same_{role}", **{key: own_embedding})
        SharedBase.from_model(bases.copy("qwen2"), **{role: same})  # type: ignore[arg-type]
        for n, other in enumerate((own_embedding + 1e-3, torch.cat([own_embedding, own_embedding[:1]]))):
            folder = with_weights(plain[role], tmp_path / f"{role}_{n}", **{key: other})
            refused(
                lambda: SharedBase.from_model(bases.copy("qwen2"), **{role: folder}),  # noqa: B023
                f"{str(folder)!r} holds {key!r}, which is not as in the base",
            )
