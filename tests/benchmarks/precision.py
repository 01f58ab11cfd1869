"""How far each precision is from float64, and each way of computing in it: trl_ext, PEFT's own layers, TRL.

python tests/benchmarks/precision.py [--model FOLDER] [--precision float32 bf16 autocast nf4] [--seeds 3]

The measure is the same weights in float64 (4-bit ones dequantised), one row at a time, without padding. Compared are
log-probabilities and values of completions, scores, and the gradients of a random linear function of log-probabilities
and values, which is what PPO's losses are in their first step. Errors of gradients are the norm of the difference over
the norm, for all A matrices, all B matrices and the value head. Rows have unlike lengths.

Thin products are computed as on a device that multiplies in bfloat16, whatever this one is.
TRL's way: the padded batch, logits over the temperature, its `selective_log_softmax`, and scalar heads in the model's
precision. PEFT's way is trl_ext's with PEFT's own LoRA layers. Without --model a tiny Llama is made.
"""

import argparse
import copy
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapters import DEVICE, as_peft, work
from peft import LoraConfig
from timing import head, row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import selective_log_softmax

from trl_ext import SharedBase
from trl_ext.roles import lora
from trl_ext.roles.switching import activate

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


class Batch(NamedTuple):
    """Prompts padded on the left, completions on the right, and the random function whose gradient is taken.

    Attributes:
        ids, mask: (rows, columns); mask bool.
        new: how many of the last columns are completion.
        by_logprob, by_value: (rows, new), 0 on padding.
    """

    ids: Tensor
    mask: Tensor
    new: int
    by_logprob: Tensor
    by_value: Tensor

    @classmethod
    def of(cls, vocabulary: int, prompt: int, new: int, rows: int) -> "Batch":
        """Row by row a token fewer of the prompt, and less of the completion."""
        ids = torch.randint(5, vocabulary, (rows, prompt + new))
        column, number = torch.arange(prompt + new), torch.arange(rows).unsqueeze(1)
        mask = (column >= number % (prompt - 1)) & (column < prompt + new - number * (new - 1) // rows)
        weights = torch.randn(2, rows, new) * mask[:, prompt:] / mask[:, prompt:].sum()
        return cls(ids.to(DEVICE), mask.to(DEVICE), new, *weights.to(DEVICE))

    def loss(self, logprobs: Tensor, values: Tensor) -> Tensor:
        """The random function."""
        return (self.by_logprob * logprobs).sum() + (self.by_value * values).sum()


class Result(NamedTuple):
    """What one way computed; log-probabilities and values (rows, new), scores (rows,), gradients by parameter."""

    logprobs: Tensor
    values: Tensor
    scores: Tensor
    gradients: dict[str, Tensor]


def tiny(folder: str) -> str:
    """A Llama whose logits differ by several nats and whose layers all matter."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 512}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def built(model: str, precision: str) -> SharedBase:
    """Policy and value on one trunk, and a reward role; every adapter and head random, heads exact in bfloat16."""
    how = work.weights(precision)
    with tempfile.TemporaryDirectory() as folder:
        SharedBase.from_pretrained(model, policy=LORA, **how).save_pretrained(folder)
        base = SharedBase.from_pretrained(model, policy=LORA, value="head", reward=Path(folder, "value"), **how)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.03)
        elif name.startswith("heads"):
            parameter.data = torch.randn(parameter.shape).mul(parameter.shape[1] ** -0.5).bfloat16().float()
    return base.to(DEVICE)


def in_float64(base: SharedBase) -> Any:
    """A copy of the model with adapters that computes in float64 alone."""
    model = as_peft(copy.deepcopy(base.model))
    for layer in list(model.modules()):
        linear = getattr(layer, "base_layer", None)
        if linear is not None and hasattr(linear.weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            layer.base_layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device=DEVICE)
            layer.base_layer.weight.data = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert linear.bias is None
    model.double().eval()
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):  # a RMSNorm of Transformers goes through float32
            norm.forward = lambda x, n=norm: (
                n.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + n.variance_epsilon)
            )
    return model


def exact(base: SharedBase, batch: Batch, temperature: float) -> Result:
    """In float64."""
    model = in_float64(base)
    heads = {name: head.weight.detach().double().requires_grad_() for name, head in base.heads.items()}
    size = batch.by_logprob.shape
    logprobs, values = (torch.zeros(size, dtype=torch.float64, device=DEVICE) for _ in range(2))
    scores = torch.zeros(size[0], dtype=torch.float64, device=DEVICE)
    for i, (words, real) in enumerate(zip(batch.ids, batch.mask, strict=True)):
        ids, count = words[real].unsqueeze(0), int(real[-batch.new :].sum())
        activate(model, "policy")
        hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        before = hidden[-count - 1 : -1]
        logits = before @ model.get_base_model().get_output_embeddings().weight.T / temperature
        of_row = logits.log_softmax(-1).gather(1, ids[0, -count:, None]).squeeze(1)
        of_values = before @ heads["value"][0]
        loss = (batch.by_logprob[i, :count].double() * of_row).sum() + (batch.by_value[i, :count] * of_values).sum()
        loss.backward()
        logprobs[i, :count], values[i, :count] = of_row.detach(), of_values.detach()
        activate(model, "reward")
        with torch.no_grad():
            last = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            scores[i] = heads["reward"][0] @ last
    return Result(logprobs, values, scores, gradients_of(model, heads["value"]))


def as_trl_ext(base: SharedBase, batch: Batch, temperature: float, precision: str) -> Result:
    """As the trainer does."""
    base.train()
    with autocast(precision):
        outputs = base(batch.ids, batch.mask, batch.new, roles=("policy", "value"), temperature=temperature)
        loss = batch.loss(outputs["logprobs"], outputs["values"])
    loss.backward()
    with torch.no_grad(), autocast(precision):
        scores = base.scores(batch.ids, batch.mask)
    return Result(outputs["logprobs"], outputs["values"], scores, gradients_of(base.model, base.heads["value"].weight))


def as_trl(base: SharedBase, batch: Batch, temperature: float, precision: str) -> Result:
    """As TRL 1.12's PPOTrainer does, over one trunk."""
    model = base.model.get_base_model().train()
    heads = {name: head.weight.detach().to(model.dtype).requires_grad_() for name, head in base.heads.items()}
    mask = batch.mask.long()
    given = {"attention_mask": mask, "position_ids": mask.cumsum(1) - mask, "output_hidden_states": True}
    ids = batch.ids.masked_fill(~batch.mask, 0)

    def outputs(name: str) -> tuple[Tensor, Tensor]:
        with autocast(precision):
            said = model(input_ids=ids, use_cache=False, **given)
            scalars = nn.functional.linear(said.hidden_states[-1], heads[name]).squeeze(-1)
        # Accelerate turns what comes out of autocast into float32.
        return (said.logits.float(), scalars.float()) if precision == "autocast" else (said.logits, scalars)

    logits, values = outputs("value")
    window = slice(-batch.new - 1, -1)
    logprobs = selective_log_softmax(logits[:, window] / (temperature + 1e-7), ids[:, -batch.new :])
    batch.loss(logprobs, values[:, window]).backward()
    with torch.no_grad(), base.use("reward"):
        last = batch.mask.long().cumsum(1).argmax(1)
        scores = outputs("reward")[1].gather(1, last.unsqueeze(1)).squeeze(1)
    return Result(logprobs, values[:, window], scores, gradients_of(base.model, heads["value"]))


def autocast(precision: str) -> Any:
    """On for "autocast"."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast")


def gradients_of(model: Any, value_head: Tensor) -> dict[str, Tensor]:
    """The policy's by name and the value head's, taken off the parameters."""
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None} | {"head": value_head}
    gradients = {name: p.grad.detach().double() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


def errors(got: Result, wanted: Result, mask: Tensor) -> dict[str, Tensor]:
    """Differences of numbers, (numbers,); and of each kind of gradient, one number, relative."""
    real = {"logprobs": mask, "values": mask, "scores": torch.ones_like(wanted.scores, dtype=torch.bool)}
    found = {name: (getattr(got, name).detach().double() - getattr(wanted, name))[at] for name, at in real.items()}
    for kind in ("lora_A", "lora_B", "head"):
        names = [name for name in wanted.gradients if kind in name]
        off, whole = (
            torch.cat([x.flatten() for x in parts]).norm()
            for parts in (
                [got.gradients[name] - wanted.gradients[name] for name in names],
                [wanted.gradients[name] for name in names],
            )
        )
        found[kind] = (off / whole).reshape(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--precision", nargs="+", choices=work.PRECISIONS, default=list(work.PRECISIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=12)
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.7)
    chosen = parser.parse_args()
    lora.multiplies = lambda *_: True
    names = ["log-probs: largest", "rms", "values: largest", "rms", "scores: largest", "rms"]
    print(head("precision", "way", *names, "gradients: A", "B", "value head"))
    with tempfile.TemporaryDirectory() as folder:
        model = chosen.model or tiny(folder)
        for precision in chosen.precision:
            found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
            for seed in range(chosen.seeds):
                torch.manual_seed(seed)
                base = built(model, precision)
                batch = Batch.of(base.config.vocab_size, chosen.prompt, chosen.new_tokens, chosen.rows)
                wanted = exact(base, batch, chosen.temperature)
                for way in ("trl_ext", "PEFT", "TRL"):
                    compute = as_trl if way == "TRL" else as_trl_ext
                    got = compute(base, batch, chosen.temperature, precision)
                    for name, off in errors(got, wanted, batch.mask[:, -batch.new :]).items():
                        found[way][name].append(off)
                    as_peft(base)  # from here on
            for way, parts in found.items():
                whole = {name: torch.cat(part) for name, part in parts.items()}
                cells = []
                for name, off in whole.items():
                    rms = f"{float(off.square().mean().sqrt()):.1e}"
                    cells += [f"{float(off.abs().max()):.1e}", rms] if name in Result._fields else [rms]
                print(row(precision, way, *cells), flush=True)


if __name__ == "__main__":
    main()
