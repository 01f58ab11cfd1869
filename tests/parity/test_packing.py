"""Packed rows say what rows alone say, and what is padding is not computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    GenerationConfig,
    RobertaConfig,
    RwkvConfig,
    XLMConfig,
    XLNetConfig,
)

from tests.helpers import DEVICE, TOLERANCE
from tests.parity import tiny
from tests.parity.test_roles import close
from tests.zoo import configs as zoo
from trl_ext import SharedBase
from trl_ext.generation import TransformersGenerator
from trl_ext.ppo.building import without_dropout
from trl_ext.roles.packing import Packing, can_pack, can_pad_left, fault_of_generate, stacked
from trl_ext.tokens import longest_row

PROMPTS, ANSWERS = (4, 1, 2, 3, 2, 4), (8, 1, 2, 1, 6, 5)


def batch(seed: int = 0) -> tiny.Padded:
    """Rows of 12, 2, 4, 4, 8 and 9 tokens; prompts padded on the left, answers on the right."""
    generator = torch.Generator().manual_seed(seed)
    prompt, answer = max(PROMPTS), max(ANSWERS)
    ids = torch.randint(3, tiny.VOCABULARY, (len(PROMPTS), prompt + answer), generator=generator)
    column = torch.arange(prompt + answer)
    before, after = torch.tensor(PROMPTS).unsqueeze(1), torch.tensor(ANSWERS).unsqueeze(1)
    mask = ((column >= prompt - before) & (column < prompt + after)).long()
    return tiny.Padded(torch.where(mask.bool(), ids, tiny.PAD).to(DEVICE), mask.to(DEVICE), answer)


def test_rows_are_laid_where_there_is_room_for_them() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 0], [9, 9, 0, 0]])
    packing = Packing.of(ids, torch.tensor([4, 1, 3, 2]))
    assert packing.is_packed
    assert packing.ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 5], [9, 9, 1, 1]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0]]
    back = packing.unpacked(packing.ids.unsqueeze(2).double()).squeeze(2)
    for row, length in enumerate((4, 1, 3, 2)):
        assert back[row, :length].tolist() == ids[row, :length].tolist()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4], [4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2], [4, 3, 3]])
def test_rows_stay_as_they_are_where_little_would_be_gained(lengths: list[int]) -> None:
    packing = Packing.of(torch.ones(len(lengths), 4, dtype=torch.long), torch.tensor(lengths))
    assert not packing.is_packed and len(packing.ids) == len(lengths)
    assert packing.position_ids.tolist() == [[0, 1, 2, 3]] * len(lengths)


def test_packings_are_stacked_as_wide_as_the_widest() -> None:
    whole = Packing.none(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    packed = Packing.of(torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 0]]), torch.tensor([4, 1, 3]))
    ids, position_ids = stacked([whole, packed])
    assert ids.tolist() == [[1, 2, 3, 1], [4, 5, 6, 4], [1, 2, 3, 4], [6, 7, 8, 5]]
    assert position_ids is not None
    assert position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0]]
    assert stacked([whole, whole])[1] is None
    hidden = ids.unsqueeze(2)
    assert whole.unpacked(hidden[:2]).squeeze(2).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert packed.unpacked(hidden[2:])[2, :3].squeeze(1).tolist() == [6, 7, 8]


@torch.no_grad()
def test_roles_of_which_some_are_packed(llama: tiny.Home) -> None:
    """What the template writes after answers fills the reward role's rows, and only its."""
    base = llama.base
    ids = torch.randint(3, 20, (4, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[2:, :5] = 0
    said = base(
        ids, mask, 2, roles=("policy", "reward"), reward_suffix_ids=[7, 8, 9], reward_suffix_rows=mask[:, 0] < 1
    )
    for row in range(4):
        real = ids[row][mask[row].bool()].tolist() + ([7, 8, 9] if row > 1 else [])
        alone = torch.tensor([real], device=DEVICE)
        close(said["scores"][row : row + 1], base.scores(alone, torch.ones_like(alone)))
    close(said["logprobs"], base.logprobs(ids, mask, 2))


@torch.no_grad()
def test_every_role_says_the_same(home: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    given, base = batch(), home.base
    assert base.packs

    def said() -> list[Tensor]:
        passed = base.score_pass(*given.args)
        each = [base.logprobs(*given.args, role=role) for role in ("policy", "reference", "value", "reward")]
        return [*each, base.values(*given.args), base.scores(given.ids, given.mask), *passed]

    packed = said()
    monkeypatch.setattr(base, "packs", False)
    for got, alone in zip(packed, said(), strict=True):
        close(got, alone)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_gradients_are_the_same(home: tiny.Home, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given, base = batch(), home.base
    without_dropout(base)
    if recomputed:
        base.gradient_checkpointing_enable()
        base.train()
    try:

        def gradients() -> dict[str, Tensor]:
            base.zero_grad()
            for role, name in (("policy", "logprobs"), ("value", "values")):
                with base.use(role):  # type: ignore[arg-type]
                    out = base(*given.args, roles=(role,))[name]
                    (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
            return {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}

        packed = gradients()
        monkeypatch.setattr(base, "packs", False)
        alone = gradients()
    finally:
        base.zero_grad()
        base.gradient_checkpointing_disable()
        base.eval()
    assert packed.keys() == alone.keys() and len(packed) > 8
    for name in alone:
        close(packed[name], alone[name])


@torch.no_grad()
def test_what_is_computed(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """39 real tokens in rows of 12: four rows instead of six."""
    shapes: list[tuple[int, ...]] = []
    hook = llama.base.causal_lm.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    given = batch()
    try:
        llama.base.values(*given.args)
        llama.base.score_pass(*given.args)
        monkeypatch.setattr(llama.base, "packs", False)
        llama.base.values(*given.args)
    finally:
        hook.remove()
    assert shapes == [(4, 12), (12, 12), (6, 12)]


@torch.no_grad()
def test_a_bin_may_be_filled_to_its_last_column(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = torch.full((3, 8), 5, device=DEVICE), torch.ones(3, 8, device=DEVICE).long()
    mask[1:, 4:] = 0
    asked: list[Packing] = []
    plain = Packing.of
    monkeypatch.setattr(Packing, "of", lambda *given: asked.append(plain(*given)) or asked[-1])
    llama.base.values(ids, mask, 2)
    assert asked[0].ids.shape == (2, 8)


def leaky(model: Any) -> Any:
    """A model that reads a bin as one row."""

    def base_model(input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> Any:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return model.base_model(input_ids=input_ids, position_ids=positions, use_cache=use_cache)

    return SimpleNamespace(
        base_model=base_model,
        config=model.config,
        modules=model.modules,
        get_input_embeddings=model.get_input_embeddings,
    )


def test_a_model_that_mixes_rows_is_not_packed(llama: tiny.Home, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.AutoModelForCausalLM.from_pretrained(llama.base_folder)
    assert can_pack(model) and not can_pack(leaky(model))
    plain = model.base_model.forward
    model.base_model.forward = lambda input_ids, use_cache: plain(input_ids=input_ids)  # takes no positions
    assert not caplog.messages
    assert not can_pack(model)
    (said,) = caplog.messages
    assert said.startswith("LlamaForCausalLM cannot be packed, so padding is computed too: ") and "position_ids" in said


def test_looking_leaves_the_mode_as_it_was(llama: tiny.Home) -> None:
    model = tiny.AutoModelForCausalLM.from_pretrained(llama.base_folder).train()
    can_pack(model)
    assert model.training
    assert SharedBase.from_model(model).causal_lm.training


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
SCALED = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", **ROPE}, "max_position_embeddings": 8},
    "longrope": {"rope_parameters": {"rope_type": "longrope", **ROPE, **FACTORS}},
}


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_a_row_that_would_rescale_its_neighbours_is_refused(kind: str) -> None:
    """Plain Transformers: a row of 4 says something else beside one of 9 than beside one of 8, or alone."""
    config = tiny.config_of("llama")
    for name, value in SCALED[kind].items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = tiny.plain_logprobs(model, tiny.Padded(ids[:1, :4], torch.ones(1, 4).long(), 3))
    mask = torch.ones(2, 9).long()
    mask[0, 4:] = 0

    def beside(columns: int) -> tiny.Padded:
        return tiny.Padded(ids[:, :columns], mask[:, :columns], columns - 1)

    assert (tiny.plain_logprobs(model, beside(9))[:1, :3] - alone).abs().max() > 1e-3
    base = SharedBase.from_model(model, policy=tiny.new_lora())
    torch.testing.assert_close(base.logprobs(*beside(8).args)[:1, :3], alone, **TOLERANCE)
    with pytest.raises(ValueError, match="A row has 9 tokens, but with more than 8 LlamaForCausalLM rescales"):
        base.logprobs(*beside(9).args)


def test_other_scalings_leave_rows_alone() -> None:
    config = tiny.config_of("llama")
    assert longest_row(config) is None
    config.rope_parameters = {"rope_type": "yarn", **ROPE}
    assert longest_row(config) is None
    parts = {
        "full_attention": {"rope_type": "longrope", **ROPE, **FACTORS},
        "sliding_attention": {"rope_type": "default"},
    }
    config.rope_parameters = parts
    assert longest_row(config) == 8


def test_models_that_padding_shifts_answer_prompts_of_one_length_together() -> None:
    """BART's decoder counts its positions from the first column."""
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = BartConfig(**shape, init_std=0.3, dropout=0.0, is_decoder=True, is_encoder_decoder=False, eos_token_id=31)
    base = SharedBase.from_model(BartForCausalLM(config).to(DEVICE)).eval()
    assert not can_pad_left(base.causal_lm) and not base.pads_left
    prompts = [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14], [15]]
    sampling = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=[31], pad_token_id=1)
    written = TransformersGenerator(base, batch_size=2).answers(prompts, sampling, "policy").ids
    padded = torch.tensor([[5, 6], [1, 8]], device=DEVICE)
    with pytest.raises(ValueError, match="Padding on the left changes what BartForCausalLM says"):
        base.generate(input_ids=padded, attention_mask=(padded > 1).long(), generation_config=sampling)
    for prompt, completion in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt], device=DEVICE)
        alone = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=sampling)
        assert completion[: alone.shape[1] - len(prompt)] == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_models_may_be_padded_on_the_left_and_sample_what_they_read(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.config_of(family)).to(DEVICE)
    assert can_pad_left(model) and fault_of_generate(model) is None


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {**SMALL, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.3}


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**HEADS, is_decoder=True, max_position_embeddings=40),  # positions from 0 only in generation
        RwkvConfig(**SMALL, attention_hidden_size=16),  # a batch's rows in one state
        XLMConfig(vocab_size=32, emb_dim=16, n_layers=2, n_heads=2, causal=True, mask_token_id=5, init_std=0.3),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_that_samples_otherwise_than_it_reads_is_refused(config: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids = torch.tensor([[3, 4, 6], [9, 8, 7]], device=DEVICE)
    said = model.generate(
        input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    read = model(input_ids=said.sequences, use_cache=False).logits[:, 2:-1].log_softmax(-1)
    assert float((torch.stack(said.logits, 1).log_softmax(-1) - read).abs().max()) > 0.1  # nats, plain Transformers
    base = SharedBase.from_model(model.to(dtype), policy=tiny.new_lora())
    with pytest.raises(ValueError, match="cannot be trained on its own samples"):
        base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


@torch.no_grad()
def test_a_model_whose_generate_fails_is_refused_with_what_it_says() -> None:
    """Plain XLNet cannot even answer two prompts in one batch."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=32, attn_type="uni")
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    ids = torch.tensor([[3, 4, 6], [9, 8, 7]], device=DEVICE)
    with pytest.raises(RuntimeError, match="output with shape"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    base = SharedBase.from_model(model, policy=tiny.new_lora())
    with pytest.raises(ValueError, match=r"on its own samples: .*fails on two prompts of it \(output with shape"):
        base.check_generates()


def test_short_rows_do_not_tell_whether_an_attention_to_blocks_of_tokens_can_be_packed_or_padded() -> None:
    """DeepSeek V4 compresses every four tokens of a row into one; the trial's rows end too soon to show it."""
    if "deepseek_v4" not in CONFIG_MAPPING:
        return  # an older Transformers
    torch.manual_seed(0)
    config = zoo.config_of("deepseek_v4")
    config.compress_rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}  # as published
    model = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    assert not can_pack(model) and not can_pad_left(model)


@torch.no_grad()
def test_a_models_own_eos_does_not_end_the_trial() -> None:
    """Here it would end what is said where padding is read a token before the rest."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(tiny.config_of("llama")).to(DEVICE).eval()

    def goes_on(prompt: list[int]) -> list[int]:
        for _ in range(3):
            prompt = [*prompt, int(model(torch.tensor([prompt], device=DEVICE)).logits[0, -1].argmax())]
        return prompt[-3:]

    alone, spoilt = goes_on([3, 4, 5]), goes_on([1, 2, 3, 4, 5])
    others = {*alone, spoilt[0]}
    assert spoilt[1] not in others
    model.generation_config.eos_token_id = [i for i in range(tiny.VOCABULARY) if i not in others]
    assert can_pad_left(model)
