"""Roles are laid on the base as they were asked for: which adapters there are, what trains, what is said where not."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
)

from tests.helpers import DEVICE, QUIET
from tests.parity import tiny
from tests.parity.test_roles import close
from trl_ext import PPOConfig, SharedBase
from trl_ext.ppo import building
from trl_ext.roles import adapters as files
from trl_ext.roles import sharing


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


@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
def test_biases_trained_beside_lora_are_refused_and_the_base_stays(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT saves the base's own biases with such an adapter, and would load them into the base of every role."""
    base = tiny.save_base(tmp_path / "base", tiny.config_of("qwen2"))
    scored = role in ("value", "reward")
    kind, task = (AutoModelForSequenceClassification, "SEQ_CLS") if scored else (AutoModelForCausalLM, "CAUSAL_LM")
    config = LoraConfig(bias="all", target_modules=["q_proj"], task_type=task)
    model = get_peft_model(kind.from_pretrained(base, **({"num_labels": 1} if scored else {})), config)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"/adapter' has bias='all': roles share every full weight.*train it again"):
        SharedBase.from_model(AutoModelForCausalLM.from_pretrained(base), **{role: tmp_path / "adapter"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nothing is loaded
    with pytest.raises(ValueError, match="has bias='all'"):
        SharedBase.from_pretrained(str(base), **{role: tmp_path / "adapter"})


# Adapters in memory ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "policy", "value", "reference", "reward", "value_role"])
def test_an_adapter_in_memory_may_be_called_as_a_role_is(name: str, llama: tiny.Home, tmp_path: Path) -> None:
    batch = tiny.padded_batch()
    expected = tiny.plain_logprobs(tiny.load_policy(llama.reference_folder).eval(), batch)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama.base_folder), llama.saved / "policy", adapter_name="other"
    )
    model.load_adapter(llama.reference_folder, name)
    model.set_adapter(name)
    base = SharedBase.from_model(model, value=llama.saved / "value", reward=llama.reward_folder).eval()
    assert base.adapters["policy"] == name
    assert len({*base.adapters.values(), "other"}) == 5
    assert len(base.trainable_parameters("policy")) == len(base.trainable_parameters("value")) - 1
    base.save_pretrained(tmp_path)
    roles = {role: tmp_path / role for role in ("policy", "reference", "value", "reward")}
    for built in (base, SharedBase.from_pretrained(str(llama.base_folder), **roles).eval()):
        for role in ("policy", "reference"):
            close(built.logprobs(*batch.args, role=role), expected)  # type: ignore[arg-type]
        close(built.values(*batch.args), llama.base.values(*batch.args))
        close(built.scores(batch.ids, batch.mask), llama.base.scores(batch.ids, batch.mask))
    close(tiny.plain_logprobs(tiny.load_policy(tmp_path / "policy").eval(), batch), expected)
    together = base.score_pass(*batch.args)
    close(together.ref_logprobs, expected)
    close(together.values, llama.base.values(*batch.args))


@torch.no_grad()
def test_a_model_may_have_layers_called_as_roles_are(llama: tiny.Home, tmp_path: Path) -> None:
    """PEFT leaves out an adapter's weights that lie under a module with the name of another adapter."""

    def loaded() -> Any:
        model = AutoModelForCausalLM.from_pretrained(llama.base_folder)
        for layer, name in zip(model.model.layers, ("value", "policy"), strict=True):
            layer.mlp = torch.nn.Sequential(OrderedDict([(name, layer.mlp)]))
        return model

    batch = tiny.padded_batch()
    base = SharedBase.from_model(loaded(), policy=tiny.new_lora()).eval()
    tiny.randomise(base, seed=1, only=f".{base.adapters['policy']}.")
    base.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(loaded(), tmp_path / "policy").eval()
    close(base.logprobs(*batch.args), tiny.plain_logprobs(alone, batch))
    assert len(load_file(tmp_path / "policy" / files.WEIGHTS)) == 2 * 14  # pairs on as many layers
    copied = SharedBase.from_model(alone).eval()
    close(copied.logprobs(*batch.args, role="reference"), base.logprobs(*batch.args))


def in_memory(home: tiny.Home, name: str = "default") -> PeftModel:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(home.base_folder), tiny.new_lora(), adapter_name=name)


@pytest.mark.parametrize("name", ["mlp", "q_proj", "0", "model", "lora_mine", "__base__"])
def test_an_adapter_in_memory_called_as_a_layer_is_refused(name: str, llama: tiny.Home) -> None:
    with pytest.raises(ValueError, match=f"adapter is called '{name}'.*load it under another adapter_name.$"):
        SharedBase.from_model(in_memory(llama, name))


def test_peft_has_no_names_with_dots(llama: tiny.Home) -> None:
    with pytest.raises(KeyError):
        in_memory(llama, "a.b")


def test_an_adapter_in_memory_that_is_not_as_saved_is_refused(llama: tiny.Home) -> None:
    """What no folder could hold: merged weights, two adapters at once, another scale."""
    model = in_memory(llama)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"has \['default'\] merged into its weights: call unmerge_adapter\(\)"):
        SharedBase.from_model(model)
    model.unmerge_adapter()
    model.add_adapter("second", tiny.new_lora(use_rslora=True))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] active at once: .* set_adapter\(name\)\.$"):
        SharedBase.from_model(model)
    model.set_adapter("second")
    module = model.get_base_model().model.layers[1].mlp.up_proj
    module.scale_layer(0.5)
    with pytest.raises(ValueError, match="'second' is scaled otherwise than its config says"):
        SharedBase.from_model(model)
    module.unscale_layer()
    SharedBase.from_model(model)


def test_a_model_with_adapters_that_are_not_roles_is_refused(llama: tiny.Home) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.base_folder)
    model = inject_adapter_in_model(tiny.new_lora(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match="The LlamaForCausalLM has adapters of its own: give the model without them"):
        SharedBase.from_model(model)


def test_a_model_that_writes_no_text_is_refused(llama: tiny.Home) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(llama.base_folder, num_labels=1)
    with pytest.raises(TypeError, match="LlamaForSequenceClassification has no LM head: give a model of Auto"):
        SharedBase.from_model(classifier)


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BIDIRECTIONAL = [
    BertConfig(**SHAPE, vocab_size=tiny.VOCABULARY, is_decoder=False),
    Gemma3TextConfig(**SHAPE, vocab_size=tiny.VOCABULARY, head_dim=8, use_bidirectional_attention=True),
    XLMConfig(vocab_size=tiny.VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, pad_index=0, causal=False),
]


@pytest.mark.parametrize("config", BIDIRECTIONAL, ids=lambda config: config.model_type)
def test_a_model_that_reads_ahead_is_refused(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = model(input_ids=ids).logits[:, :3]
    assert not torch.equal(first, second)  # the last token changes what is said before it
    with pytest.raises(ValueError, match=r"^\w+ reads ahead: a later token changes .* make it causal in its config"):
        SharedBase.from_model(model)


@torch.no_grad()
def test_a_model_that_reads_pictures_too_is_loaded_whole_where_there_is_no_text_model(tmp_path: Path) -> None:
    """What is trained is what reads texts."""
    text = {"model_type": "mistral", **SHAPE, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": tiny.VOCABULARY}
    vision = {"model_type": "pixtral", **SHAPE, "head_dim": 8, "image_size": 28, "patch_size": 14}
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    base = SharedBase.from_pretrained(str(tmp_path / "model"), value="head")
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad and "lora" in name]
    assert trained and all(".language_model." in name for name in trained)
    by_recipe = SharedBase.from_pretrained(str(tmp_path / "model"), policy=tiny.new_lora(target_modules="all-linear"))
    assert sum(p.numel() for p in by_recipe.parameters() if p.requires_grad) > 0
    assert not [n for n, p in by_recipe.named_parameters() if p.requires_grad and "lora" in n and "vision" in n]
    ids = torch.tensor([[5, 6, 7, 8]])
    close(base.logprobs(ids, ids > 0, 3)[0], model(input_ids=ids).logits[0, :-1].log_softmax(-1)[range(3), ids[0, 1:]])
    base.save_pretrained(tmp_path / "roles")
    saved = {role: tmp_path / "roles" / role for role in ("policy", "value")}
    SharedBase.from_pretrained(str(tmp_path / "model"), **saved)


def test_a_base_with_weights_of_chance_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    """Transformers warns of what a checkpoint lacks, and draws it."""
    plain, shapes = str(llama.base_folder), r"of shape \(64, 32\), and \(65, 32\) is needed"
    AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).save_pretrained(tmp_path / "classifier")
    AutoModel.from_pretrained(plain).save_pretrained(tmp_path / "trunk")
    config = json.loads((llama.base_folder / "config.json").read_text())
    shutil.copytree(plain, tmp_path / "wider")
    (tmp_path / "wider/config.json").write_text(json.dumps({**config, "vocab_size": 65}))
    shutil.copytree(plain, tmp_path / "gap")
    state = load_file(llama.base_folder / "model.safetensors")
    state.pop("model.layers.1.mlp.down_proj.weight")
    save_file(state, tmp_path / "gap/model.safetensors", {"format": "pt"})
    for folder, says in {
        "classifier": "holds no 'lm_head.weight', which would be random: give the checkpoint of a causal language",
        "trunk": r"holds no 'lm_head.weight'",
        "gap": r"holds no 'model.layers.1.mlp.down_proj.weight'",
        "wider": shapes,
    }.items():
        with pytest.raises(ValueError, match=says):
            SharedBase.from_pretrained(str(tmp_path / folder))


def test_a_base_whose_weights_are_elsewhere_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    where = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(ValueError, match=r"^The weight 'model\.layers\.1\..*' is not in memory.*give a device_map"):
        SharedBase.from_pretrained(str(llama.base_folder), device_map=where, offload_folder=str(tmp_path))


def test_what_is_no_causal_language_model_as_it_is_says_so(llama: tiny.Home, tmp_path: Path) -> None:
    encoder = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match=r"^T5ForConditionalGeneration has an encoder: give a model of Auto"):
        SharedBase.from_model(encoder)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of the type 't5', which is no causal language model: give one that is"):
        SharedBase.from_pretrained(str(tmp_path))
    with pytest.raises(TypeError, match=r"^The model is of type OptimizedModule, around another one: give a model"):
        SharedBase.from_model(torch.compile(AutoModelForCausalLM.from_pretrained(llama.base_folder)))
    once = get_peft_model(AutoModelForCausalLM.from_pretrained(llama.base_folder), tiny.new_lora())
    with pytest.warns(UserWarning), pytest.raises(TypeError, match="PeftModelForCausalLM, around another one"):
        SharedBase.from_model(get_peft_model(once, tiny.new_lora(), adapter_name="second"))
    with pytest.raises(ValueError, match="return_dict=False, and its outputs are read by name: set it to True"):
        SharedBase.from_pretrained(str(llama.base_folder), return_dict=False)


def test_how_to_load_is_checked_before_loading(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(llama.base_folder)
    assert SharedBase.from_pretrained(name, dtype="torch.bfloat16").causal_lm.dtype == torch.bfloat16
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    with pytest.raises(ValueError, match=r"^dtype is 'float15', which torch does not know: give one such as"):
        SharedBase.from_pretrained(name, dtype="float15")
    with pytest.raises(TypeError, match=r"^quantization_config is '4bit': give a transformers.BitsAndBytesConfig"):
        SharedBase.from_pretrained(name, quantization_config="4bit")


# What does not fit ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_a_deeper_base_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    """Its shapes fit, and PEFT would leave out the layers that are not here."""
    config = tiny.config_of("llama")
    config.num_hidden_layers = 3
    deeper = tiny.save_base(tmp_path / "deeper", config)
    for role, save in (("policy", tiny.save_policy_adapter), ("reward", tiny.save_reward_adapter)):
        folder = save(tmp_path / f"of_deeper_{role}", deeper, seed=1)
        folder = copied_with(folder, tmp_path / role, base_model_name_or_path=str(llama.base_folder))
        with pytest.raises(ValueError, match=r"does not fit the base .*no layer for '.*layers\.2\..*train it over"):
            llama.again(**{role: folder})


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"target_modules": ["nowhere"]}, "Target modules"),
        ({"target_modules": "("}, "no regular expression"),
        ({"r": 0}, "positive"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "even"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_in_one_sentence(
    changes: dict[str, Any], says: str, llama: tiny.Home
) -> None:
    with pytest.raises(ValueError, match=f"^The policy's LoraConfig .*{says}") as raised:
        llama.again(policy=tiny.new_lora(**changes))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_head_for_another_width_is_refused(llama: tiny.Home, tmp_path: Path) -> None:
    """Even of width 1, which would spread over all."""
    for width in (1, 31):
        folder = tmp_path / str(width)
        folder.mkdir()
        save_file({"score.weight": torch.ones(1, width)}, folder / files.HEAD)
        with pytest.raises(ValueError, match=f"reads hidden states of size {width}, and the base's have 32: train it"):
            llama.again(value=folder)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        llama.again(reward=folder)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"LORA"'])
def test_a_configuration_that_is_none_is_refused(text: str, llama: tiny.Home, tmp_path: Path) -> None:
    folder = copied_with(llama.saved / "policy", tmp_path / "broken")
    (folder / files.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json' is no JSON object"):
        llama.again(reference=folder)


# How the base is loaded -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_was_saved_quantised_is_loaded_as_it_was_saved(
    bits: int, llama: tiny.Home, tmp_path: Path
) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if bits == 4 else None
    how = how or BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(llama.base_folder, quantization_config=how).save_pretrained(tmp_path)
    batch, name = tiny.padded_batch(), str(tmp_path)
    # Not in eval mode: there bitsandbytes before 0.50 repacks 4-bit weights on some CPUs, and fails on small ones.
    expected = tiny.plain_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path).train(bits == 4), batch)
    unquantised = tiny.plain_logprobs(AutoModelForCausalLM.from_pretrained(llama.base_folder).eval(), batch)
    for base in (SharedBase.from_pretrained(name), SharedBase.from_pretrained(name, quantization_config=how)):
        assert base.causal_lm.dtype == torch.float32 and files.is_quantized(base.causal_lm)
        got = base.eval().logprobs(*batch.args, role="reference")
        assert (got - expected).abs().max() < 1e-3 < (got - unquantised).abs().max()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        base = SharedBase.from_pretrained(name, dtype=torch.bfloat16)
    message = r"dtype is torch\.bfloat16, but .* was saved quantised.* in torch\.float32"
    told = any(warned.category is UserWarning and re.search(message, str(warned.message)) for warned in said)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype  # older Transformers obey
    assert base.causal_lm.dtype == plain and told == (plain == torch.float32)
    with pytest.raises(ValueError, match="was saved with a quantization_config of its own, and another one was given"):
        other = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        SharedBase.from_pretrained(name, quantization_config=other)


@pytest.mark.parametrize("older", [torch.bfloat16, "bfloat16"])
def test_torch_dtype_means_dtype(older: Any, llama: tiny.Home) -> None:
    name = str(llama.base_folder)
    assert SharedBase.from_pretrained(name, torch_dtype=older).causal_lm.dtype == torch.bfloat16
    assert SharedBase.from_pretrained(name, torch_dtype=older, dtype="bfloat16").causal_lm.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"^dtype is torch.float16 and torch_dtype, its older name, is .*leave torch_"):
        SharedBase.from_pretrained(name, torch_dtype=older, dtype=torch.float16)


def test_dtype_may_be_the_checkpoints(llama: tiny.Home, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama.base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert SharedBase.from_pretrained(str(tmp_path), dtype="auto").causal_lm.dtype == torch.bfloat16
    assert SharedBase.from_pretrained(str(tmp_path), torch_dtype="auto").causal_lm.dtype == torch.bfloat16
    assert SharedBase.from_pretrained(str(tmp_path)).causal_lm.dtype == torch.float32


def test_a_quantised_lm_head_is_refused(llama: tiny.Home) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    with pytest.raises(ValueError, match=r"The model's LM head is quantised.*name it in llm_int8_skip_modules"):
        SharedBase.from_pretrained(str(llama.base_folder), quantization_config=how)


def test_lora_on_an_lm_head_of_another_name_is_refused(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LM_HEADS", ())
    with pytest.raises(ValueError, match="targets the LM head"):
        SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(target_modules=["q_proj", "lm_head"]))


def test_what_a_trainer_loads_a_base_with(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model_init_kwargs` go before what suits the device, and contradict nothing silently."""
    loads: list[dict[str, Any]] = []
    monkeypatch.setattr(SharedBase, "from_pretrained", lambda name, **how: loads.append(how))
    monkeypatch.setattr(building, "args_of_gpu", lambda *_: {"device_map": {"": "cuda:0"}, "dtype": torch.bfloat16})

    def build(model: Any, quantization: Any = None, **init: Any) -> Any:
        building.build_base(model, PPOConfig("out", **QUIET, model_init_kwargs=init), quantization, tiny.new_lora())
        return {key: loads[-1].get(key) for key in ("dtype", "torch_dtype", "device_map", "quantization_config")}

    on_gpu = {"dtype": torch.bfloat16, "torch_dtype": None, "device_map": {"": "cuda:0"}, "quantization_config": None}
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    assert build("m") == on_gpu
    assert build("m", dtype="float32", device_map="auto") == {**on_gpu, "dtype": "float32", "device_map": "auto"}
    assert build("m", torch_dtype="float16") == {**on_gpu, "dtype": None, "torch_dtype": "float16"}
    assert build("m", four_bit) == {**on_gpu, "dtype": None, "quantization_config": four_bit}
    assert build("m", quantization_config=four_bit) == {**on_gpu, "dtype": None, "quantization_config": four_bit}
    with pytest.raises(ValueError, match="quantization_config is given twice, also in model_init_kwargs"):
        build("m", four_bit, quantization_config={"load_in_8bit": True})
    for model in (AutoModelForCausalLM.from_pretrained(llama.base_folder), llama.base):
        with pytest.raises(ValueError, match="loaded already: give model_init_kwargs where you load it"):
            build(model, dtype="float32")


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
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    assert loads == [
        {"dtype": torch.float32, **told},
        {"dtype": torch.bfloat16, "quantization_config": four_bit, **told},
        {"dtype": torch.float16, "device_map": {"": "cpu"}, "attn_implementation": "eager", **told},
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


# What the default LoRA fits -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_default_lora_leaves_out_what_peft_cannot_adapt() -> None:
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    base = SharedBase.from_model(MambaForCausalLM(MambaConfig(state_size=4, **shape)))
    names = {name.split(".")[-4] for name, _ in base.named_parameters() if "lora_A.policy" in name}
    assert names == {"in_proj", "x_proj", "dt_proj"}
    ids = torch.randint(3, 64, (2, 6))
    logits = base.causal_lm(ids).logits[:, 2:-1].log_softmax(dim=-1)
    expected = logits.gather(2, ids[:, 3:].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(base.logprobs(ids, torch.ones_like(ids), 3), expected)


@torch.no_grad()
def test_heads_are_as_wide_as_the_trunks_states() -> None:
    """OPT-350m projects its states before they reach the LM head."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    base = SharedBase.from_model(OPTForCausalLM(config)).eval()
    ids = torch.randint(3, 64, (2, 6))
    tiny.randomise(base, seed=0, only="heads.")
    hidden = base.causal_lm.model(ids).last_hidden_state
    expected = (hidden @ base.heads["value"].weight.T).squeeze(-1)[:, 2:-1]  # type: ignore[operator]
    torch.testing.assert_close(base.values(ids, torch.ones_like(ids), 3), expected)


def test_what_is_trained_is_float32_though_a_peft_model_is_not(llama: tiny.Home) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama.base_folder), tiny.new_lora()).to(torch.bfloat16)
    base = SharedBase.from_model(model)
    assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}
    assert base.causal_lm.dtype == torch.bfloat16
