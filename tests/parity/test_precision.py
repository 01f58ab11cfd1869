"""The table of docs/numerics.md: what stays in float32, and what is computed in half precision."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from tests.helpers import DEVICE
from tests.parity import ppo, tiny

HALF = torch.bfloat16
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=HALF)
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "bf16": ({"dtype": HALF}, False),
    "bf16 with autocast": ({"dtype": HALF}, True),
    "float32 with autocast": ({}, True),
    "NF4": ({"quantization_config": NF4}, False),
    "NF4 with autocast": ({"quantization_config": NF4}, True),
}


@pytest.mark.parametrize("value", ["adapter", "head"])
@pytest.mark.parametrize("how", WAYS)
def test_what_is_trained_and_what_is_summed_is_float32(how: str, value: str, tmp_path: Path) -> None:
    loaded, autocast = WAYS[how]
    folder = tiny.save_base(tmp_path / "base", ppo.small("llama"))
    base = ppo.random_base(folder, value, **loaded)
    assert base.generate_fault is None and base.pads_left  # tried now, outside autocast
    seen: dict[str, set[torch.dtype]] = {"hidden states": set(), "W x": set()}
    attention = base.causal_lm.model.layers[1].self_attn
    attention.o_proj.base_layer.register_forward_hook(lambda module, inputs, output: seen["W x"].add(output.dtype))
    base.causal_lm.model.norm.register_forward_hook(lambda *call: seen["hidden states"].add(call[-1].dtype))
    trainer = ppo.make_trainer(base, tmp_path, bf16=autocast, learning_rate=1e-3, max_steps=2)
    trainer.train()

    half = HALF if how != "float32 with autocast" else torch.float32
    assert {p.dtype for name, p in base.named_parameters() if "layernorm" in name} == {half}
    assert seen == {"hidden states": {half}, "W x": {HALF}}
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert len(moments) >= 2 * len(trained) and {moment.dtype for moment in moments} == {torch.float32}
    batch = tiny.padded_batch(vocabulary=12)
    with torch.autocast(DEVICE.type, HALF, enabled=autocast):
        outputs = base(*batch.args, roles=("policy", "reference", "value"))
    assert {name: tensor.dtype for name, tensor in outputs.items()} == dict.fromkeys(
        ("logprobs", "entropy", "ref_logprobs", "values"), torch.float32
    )
    sum(outputs[name].sum() for name in ("logprobs", "values")).backward()  # type: ignore[union-attr]
    assert {parameter.grad.dtype for parameter in trained if parameter.grad is not None} == {torch.float32}
    experience = trainer.experience
    assert experience is not None
    parts = [experience, experience.score_pass, experience.scores]
    numbers = [getattr(part, field.name) for part in parts for field in fields(part)]
    floats = {x.dtype for x in numbers if isinstance(x, Tensor) and x.is_floating_point()}
    assert floats == {torch.float32}


def test_the_log_softmax_does_not_round_its_sums(tmp_path: Path) -> None:
    """Over logits in half precision: their rounding stays, that of the sum over the vocabulary does not come on top."""
    folder = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    base = ppo.random_base(folder, "head", dtype=HALF)
    ids = torch.randint(3, 64, (3, 12), device=DEVICE)
    with torch.no_grad():
        said = base(ids, torch.ones_like(ids), 6)["logprobs"]
        with base.use("policy"):
            logits = base.causal_lm(ids).logits[:, 5:-1]
    targets = ids[:, 6:].unsqueeze(2)
    exact = logits.double().log_softmax(dim=-1).gather(2, targets).squeeze(2)
    rounded = logits.log_softmax(dim=-1).gather(2, targets).squeeze(2)
    assert float((said - exact).abs().max()) < 1e-5 < float((rounded - exact).abs().max())
