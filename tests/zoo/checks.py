"""What is compared for one model: every role against ordinary Transformers and PEFT models that read each row alone.

A row alone, unpadded, in one forward without a cache is the truth here: no padding, packing, mixing or neighbour can
have touched it.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

import trl_ext
from tests.parity import ppo, tiny
from tests.zoo import configs
from trl_ext import PPOConfig, PPOTrainer, SharedBase
from trl_ext.generation import TransformersGenerator
from trl_ext.ppo.building import without_dropout
from trl_ext.tokens import cut_at_eos

# (prompt, completion) tokens of each row: shorter, as long as and longer than a window of 6 or a context of 8.
ROWS = [(5, 6), (2, 7), (7, 1), (1, 4), (4, 3), (1, 1), (3, 1), (1, 2)]
COMPLETION = max(c for _, c in ROWS)
# Largest difference that float32 explains: nats, value or score; relative norm of a gradient; nats of first_approxkl.
LIMITS = {"output": 2e-4, "gradient": 2e-3, "approxkl": 1e-6}
ROUTERS = r".*router.*"  # some return more than a product
MAMBA = ["out_proj", "conv1d"]  # PEFT refuses to adapt them: Mamba's kernels read their weights past the layer
GROUPED = ["o_a_proj"]  # a product a group of heads, which PEFT takes for a linear layer
CAUSAL = ("policy", "reference")
ROLES = ("policy", "reference", "value", "reward")


@dataclass
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        verdict: "right", "wrong", "refused", "raw", "absent" (plain Transformers cannot do it either).
        difference: the largest; None where nothing was compared.
        note: a sentence.
    """

    check: str
    verdict: str
    difference: float | None = None
    note: str = ""
    seconds: float = 0.0


class NotPlain(Exception):
    """Plain Transformers and PEFT cannot train, or generate with, this model here.

    Attributes:
        zoo: where that shows in numbers alone, so that nothing but a sentence of ours keeps a user from them.
    """

    def __init__(self, reason: str, zoo: Zoo | None = None) -> None:
        super().__init__(reason)
        self.zoo = zoo


def sentence(error: BaseException) -> str:
    """The last line of an error, shortened."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:300] if lines else ''}"


def is_refusal(error: BaseException) -> bool:
    """Whether trl_ext itself said in one sentence that it cannot do this."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(trl_ext.__file__).parent
    kinds = (NotImplementedError, ValueError, TypeError)
    return (
        isinstance(error, kinds)
        and ours in Path(frames[-1].filename).parents
        and error.__cause__ is None
        and "\n" not in str(error).strip()
    )


# The plain way -------------------------------------------------------------------------------------------------------


def with_lora(folder: Path) -> PeftModel:
    """The model in `folder` with LoRA on every linear layer that PEFT finds and that can have it."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    errors = []
    for left_out in (None, MAMBA, GROUPED, ROUTERS):
        try:
            model = get_peft_model(load_base(folder), LoraConfig(exclude_modules=left_out, **settings))
            with torch.no_grad():
                hidden_of(model, torch.tensor([3, 4]))
            return model
        except Exception as error:
            errors.append(error)
    raise errors[0]


@dataclass
class Zoo:
    """One tiny model on disk with an adapter for each role, and the same loaded plainly.

    Attributes:
        folder: holds base/, and policy/, reference/, value/, reward/ as a user would give them.
        plain: each role's model alone.
        heads: score heads (1, hidden), "value" and "reward".
        rows: ids of each row.
        generates: the rows that plain Transformers samples, alone, as its own forward reads them.
    """

    folder: Path
    config: Any
    plain: dict[str, PeftModel]
    heads: dict[str, Tensor]
    rows: list[Tensor]
    generates: list[int] = field(default_factory=list)

    @cached_property
    def said(self) -> dict[str, list[Tensor]]:
        """What each role says of each row, alone."""
        return expected(self)

    @cached_property
    def gradients(self) -> dict[str, dict[str, Tensor]]:
        """Of policy and value, row by row."""
        return {role: plain_gradients(self, role) for role in ("policy", "value")}

    @property
    def base_folder(self) -> Path:
        return self.folder / "base"

    def shared(self, root: Path | None = None) -> SharedBase:
        """The four roles over one base, from the folders in `root`."""
        root = root or self.folder
        roles = {role: str(root / role) for role in ROLES}
        return SharedBase.from_pretrained(str(self.base_folder), **roles).eval()


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows_of(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (p + c,), generator=generator) for p, c in ROWS]


def inputs_of(ids: Tensor) -> dict[str, Any]:
    """Arguments of a forward of one row. With a cache, recurrent models overwrite what their gradients need."""
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "use_cache": False}


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """All logits (columns, vocabulary) of one row alone."""
    return model(**inputs_of(ids)).logits[0].float()


def hidden_of(model: PeftModel, ids: Tensor) -> Tensor:
    """Last hidden states (columns, size) of one row alone."""
    causal_lm = model.get_base_model()
    trunk = causal_lm.base_model if causal_lm.base_model is not causal_lm else causal_lm.model
    return trunk(**inputs_of(ids)).last_hidden_state[0]


def logprobs_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probability of each token but the first, (columns - 1,)."""
    return logits_of(model, ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def build(folder: Path, config: Any) -> Zoo:
    """Write the model and its adapters; see that plain Transformers can train it and generate with it.

    Raises:
        NotPlain: it cannot.
    """
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if type(model.config) is not type(config):  # a part of it, which Transformers finds in the whole
            model = AutoModelForImageTextToText.from_config(config)
        model.float().save_pretrained(folder / "base")
        del model
        vocabulary = config.get_text_config().vocab_size
        tiny.make_tokenizer(vocabulary).save_pretrained(folder / "base")
    except Exception as error:
        raise NotPlain(f"cannot be built: {sentence(error)}") from error
    try:
        plain = {}
        heads = {}
        for seed, role in enumerate(ROLES):
            model = with_lora(folder / "base")
            tiny.randomise(model, seed + 1, only="lora_")
            plain[role] = model.eval()
            if role in CAUSAL:
                model.save_pretrained(folder / role)
                continue
            with torch.no_grad():
                size = hidden_of(model, torch.tensor([3, 4])).shape[1]
            heads[role] = 0.3 * torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
            save_scored(model, heads[role], folder / role)
    except Exception as error:
        raise NotPlain(f"PEFT cannot adapt it: {sentence(error)}") from error
    zoo = Zoo(folder, config, plain, heads, rows_of(vocabulary))
    check_plain(zoo)
    return zoo


def save_scored(model: PeftModel, head: Tensor, folder: Path) -> None:
    """Save an adapter and a score head as PEFT saves an adapter of a sequence classifier."""
    folder.mkdir()
    state = {**get_peft_model_state_dict(model), "base_model.model.score.weight": head}
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors"
    )
    config = replace(copy.deepcopy(model.peft_config["default"]), task_type="SEQ_CLS", inference_mode=True)
    config.modules_to_save = ["score"]
    config.save_pretrained(str(folder))


def check_plain(zoo: Zoo) -> None:
    """Plain Transformers itself: causal, the same twice, with a gradient, and it generates.

    Raises:
        NotPlain: it is not so.
    """
    model, ids = zoo.plain["policy"], zoo.rows[0]
    try:
        with torch.no_grad():
            first, again = logits_of(model, ids), logits_of(model, ids)
            shorter, changed = logits_of(model, ids[:-2]), ids.clone()
            changed[-1] = 3 + (changed[-1] - 2) % (zoo.config.get_text_config().vocab_size - 3)
            other = logits_of(model, changed)
    except Exception as error:
        raise NotPlain(f"forward: {sentence(error)}") from error
    if not torch.isfinite(first).all():
        raise NotPlain("forward: its logits are not finite")
    if (first - again).abs().max() > 1e-4:
        raise NotPlain(f"two forwards in eval mode differ by {float((first - again).abs().max()):.2g}")
    if (first - other)[:-1].abs().max() > 1e-4:
        raise NotPlain("not causal: a token changes the logits before it")
    if (first[:-2] - shorter).abs().max() > 1e-3:
        zoo.__dict__["longer_changes"] = float((first[:-2] - shorter).abs().max())
    try:
        logprobs_of(model, ids).sum().backward()
    except Exception as error:
        raise NotPlain(f"backward: {sentence(error)}") from error
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if not gradients or not all(torch.isfinite(g).all() for g in gradients):
        raise NotPlain("backward: its gradients are missing or not finite")
    try:
        off = generation_alone(zoo)
        zoo.generates = [i for i, nats in enumerate(off) if nats <= LIMITS["output"]]
    except Exception as error:
        raise NotPlain(f"generate: {sentence(error)}") from error
    if len(zoo.generates) < len(ROWS) // 2:
        nats = sorted(off)[len(off) // 2]
        raise NotPlain(f"generate: it samples with log-probabilities {nats:.2g} nats off those of its own forward", zoo)


# Batches -------------------------------------------------------------------------------------------------------------


def batch_of(rows: list[Tensor], layout: str) -> tuple[Tensor, Tensor, int]:
    """Ids, mask and number of completion columns of `rows` in a layout of `tiny.LAYOUTS` ("gap" left out)."""
    longest, width = max(map(len, rows)), max(p for p, _ in ROWS)
    ids, lines = [], []
    for row, (prompt, completion) in zip(rows, ROWS, strict=True):
        if layout == "rollout":
            before, after = width - prompt, COMPLETION - completion
        else:
            before, after = (longest - len(row), 0) if layout == "left" else (0, longest - len(row))
        ids.append(nn.functional.pad(row, (before, after), value=configs.PAD))
        lines.append(nn.functional.pad(torch.ones_like(row), (before, after)))
    return torch.stack(ids), torch.stack(lines), COMPLETION if layout == "rollout" else longest - 1


def tail(per_token: Tensor, mask: Tensor, columns: int) -> list[Tensor]:
    """The completion's numbers of each row, from (rows, columns)."""
    real = mask[:, mask.shape[1] - columns :].bool()
    return [row[r][-c:] for row, r, (_, c) in zip(per_token, real, ROWS, strict=True)]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference; infinite where a number is not finite."""
    difference = max(float((g.detach() - e.detach()).abs().max()) for g, e in zip(got, expected, strict=True))
    return difference if math.isfinite(difference) else math.inf


def generated(model: Any, prompts: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Greedy completions: ids, mask, and the log-probs that each token was chosen with."""
    width, new = max(map(len, prompts)), 6
    ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    settings = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=configs.PAD, eos_token_id=configs.EOS,
        bos_token_id=configs.BOS, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[configs.PAD],  # it embeds to zeros, which give a sparse attention's index nothing but ties
    )  # fmt: skip
    with torch.no_grad():
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    written = said.sequences[:, width:]
    if written.shape[1] != new:
        raise ValueError(f"generate wrote {written.shape[1]} tokens of {new}")
    logits = torch.stack(said.logits, dim=1).float().log_softmax(-1)
    return (
        said.sequences,
        torch.cat([mask, torch.ones_like(written)], dim=1),
        list(logits.gather(2, written[..., None])[..., 0]),
    )


# Checks --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expected(zoo: Zoo) -> dict[str, list[Tensor]]:
    """What each role says of each row, alone."""
    said: dict[str, list[Tensor]] = {}
    for role, model in zoo.plain.items():
        if role in CAUSAL:
            said[role] = [logprobs_of(model, ids)[-c:] for ids, (_, c) in zip(zoo.rows, ROWS, strict=True)]
            continue
        read = [(hidden_of(model, ids) @ zoo.heads[role].T)[:, 0] for ids in zoo.rows]
        said[role] = [r[-1:] if role == "reward" else r[:-1][-c:] for r, (_, c) in zip(read, ROWS, strict=True)]
    return said


def roles_apart(zoo: Zoo, base: SharedBase, layout: str) -> dict[str, float]:
    """Each role in a forward of its own."""
    ids, mask, columns = batch_of(zoo.rows, layout)
    truth, found = zoo.said, {}
    with torch.no_grad():
        for role in ("policy", "reference"):
            found[role] = distance(tail(base.logprobs(ids, mask, columns, role=role), mask, columns), truth[role])
        found["value"] = distance(tail(base.values(ids, mask, columns), mask, columns), truth["value"])
        found["reward"] = distance(list(base.scores(ids, mask)[:, None]), truth["reward"])
    return found


def roles_mixed(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """All roles in one forward."""
    ids, mask, columns = batch_of(zoo.rows, "rollout")
    truth, said = zoo.said, base.score_pass(ids, mask, columns)
    return {
        "reference": distance(tail(said.ref_logprobs, mask, columns), truth["reference"]),
        "value": distance(tail(said.values, mask, columns), truth["value"]),
        "reward": distance(list(said.scores[:, None]), truth["reward"]),
    }


def one_row_each(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """Each row alone through the roles, mixed: the batch of an evaluation's last row."""
    truth, found = zoo.said, {"reference": 0.0, "value": 0.0, "reward": 0.0}
    for i, (ids, (_, c)) in enumerate(zip(zoo.rows, ROWS, strict=True)):
        said = base.score_pass(ids[None], torch.ones_like(ids[None]), c)
        for role, number in (
            ("reference", said.ref_logprobs),
            ("value", said.values),
            ("reward", said.scores[:, None]),
        ):
            found[role] = max(found[role], distance([number[0]], [truth[role][i]]))
    return found


def training_forward(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """What the policy says while it is trained, dropout off as the trainer has it, twice."""
    ids, mask, columns = batch_of(zoo.rows, "rollout")
    truth = zoo.said
    with_dropout = {name: m.p for name, m in base.named_modules() if hasattr(m, "p") and isinstance(m.p, float)}
    without_dropout(base)
    base.train()
    try:
        found = {
            "policy": max(
                distance(tail(base.logprobs(ids, mask, columns), mask, columns), truth["policy"]) for _ in "12"
            ),
            "value": distance(tail(base.values(ids, mask, columns), mask, columns), truth["value"]),
        }
    finally:
        base.eval()
    del with_dropout
    return found


def _weights(role: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7 if role == "policy" else 8)
    return [torch.randn(c, generator=generator) for _, c in ROWS]


def plain_gradients(zoo: Zoo, role: str) -> dict[str, Tensor]:
    """Of a weighted sum of log-probs or values, row by row."""
    model = zoo.plain[role]
    model.zero_grad()
    head = zoo.heads["value"].clone().requires_grad_(True)
    for ids, (_, c), weights in zip(zoo.rows, ROWS, _weights(role), strict=True):
        said = logprobs_of(model, ids) if role == "policy" else (hidden_of(model, ids) @ head.T)[:-1, 0]
        (said[-c:] * weights).sum().backward()
    found = {
        name.replace(".default", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if "lora_" in name and p.grad is not None
    }
    model.zero_grad()
    return {**found, "head": head.grad} if role == "value" and head.grad is not None else found


def shared_gradients(zoo: Zoo, base: SharedBase, role: str) -> dict[str, Tensor]:
    """The same through the shared base."""
    ids, mask, columns = batch_of(zoo.rows, "rollout")
    base.zero_grad()
    said = (base.logprobs if role == "policy" else base.values)(ids, mask, columns)
    sum((row * w).sum() for row, w in zip(tail(said, mask, columns), _weights(role), strict=True)).backward()
    found = {
        _without_role(n, base.adapters[role]): p.grad.clone() for n, p in base.named_parameters() if p.grad is not None
    }
    base.zero_grad()
    return found


def _without_role(name: str, adapter: str | None) -> str:
    if name.startswith("heads."):
        return "head"
    head, lora_, rest = name.removeprefix("model.").rpartition("lora_")
    return head + lora_ + rest.replace(f".{adapter}", "")


def gradient_distance(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's gradient; a parameter whose gradient is next to nothing is measured
    against the whole."""
    total = math.sqrt(sum(float(g.norm()) ** 2 for g in truth.values()))
    zeros = {name: torch.zeros_like(g) for name, g in truth.items()}
    if surplus := {n for n in got.keys() - truth.keys() if float(got[n].norm()) > 1e-6 * total}:
        raise AssertionError(f"gradient of {sorted(surplus)[0]}, which has none alone")
    worst = max(float((got.get(n, zeros[n]) - g).norm()) / max(float(g.norm()), 1e-2 * total) for n, g in truth.items())
    return worst if math.isfinite(worst) else math.inf


def gradients(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """Of policy and value, in training mode."""
    without_dropout(base)
    base.train()
    try:
        return {r: gradient_distance(shared_gradients(zoo, base, r), zoo.gradients[r]) for r in ("policy", "value")}
    finally:
        base.eval()


def recomputed(zoo: Zoo, base: SharedBase) -> dict[str, float] | str:
    """The same with recomputed activations; a sentence where plain Transformers has none for this model."""
    try:
        alone = zoo.plain["policy"].train()
        alone.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        logprobs_of(alone, zoo.rows[0]).sum().backward()
    except Exception as error:
        return sentence(error)
    base.gradient_checkpointing_enable()
    try:
        return gradients(zoo, base)
    finally:
        base.gradient_checkpointing_disable()


def generation_alone(zoo: Zoo) -> list[float]:
    """Plain generation of each row alone against the plain forward."""
    model, off = zoo.plain["policy"], []
    for row, (prompt, _) in zip(zoo.rows, ROWS, strict=True):
        sequences, _, said = generated(model, [row[:prompt]])
        with torch.no_grad():
            off.append(distance(said, [logprobs_of(model, sequences[0])[-len(said[0]) :]]))
    return off


def generation(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """What tokens were chosen with, prompts padded on the left where the base allows it, against what is scored
    afterwards."""
    prompts = [row[:prompt] for row, (prompt, _) in zip(zoo.rows, ROWS, strict=True)]
    said, scored = [], []
    for part in [prompts] if base.pads_left else [[prompt] for prompt in prompts]:
        sequences, mask, chosen = generated(base, part)
        with torch.no_grad():
            scored += list(base.logprobs(sequences, mask, len(chosen[0])))
        said += chosen
    return {"policy": distance([said[i] for i in zoo.generates], [scored[i] for i in zoo.generates])}


def completions(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """What a rollout's generator writes, greedily, some prompts twice, rows ending at unlike places: by how many nats
    each token misses the best one of its row read alone."""
    prompts = [zoo.rows[i][: ROWS[i][0]] for i in zoo.generates]
    prompts += prompts[:2]
    ends = [configs.PAD, *range(3, 3 + configs.VOCABULARY // 5)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=configs.PAD, eos_token_id=ends)
    written = TransformersGenerator(base, len(prompts)).answers([p.tolist() for p in prompts], config, "policy").ids
    missed = 0.0
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = torch.cat([prompt, torch.tensor(cut_at_eos(tokens, ends))])
        with torch.no_grad():
            best = logits_of(zoo.plain["policy"], ids[:-1])[len(prompt) - 1 :].log_softmax(-1)
        missed = max(missed, float((best.amax(-1) - best.gather(1, ids[len(prompt) :, None])[:, 0]).max()))
    return {"policy": missed}


def defaults(zoo: Zoo, folder: Path | None = None) -> dict[str, float]:
    """The base alone, with the package's own default adapter: at first it changes nothing."""
    folder = folder or zoo.base_folder
    base, alone = SharedBase.from_pretrained(str(folder)).eval(), load_base(folder)
    ids, mask, columns = batch_of(zoo.rows, "rollout")
    truth = _completions(zoo, alone)
    with torch.no_grad():
        return {r: distance(tail(base.logprobs(ids, mask, columns, role=r), mask, columns), truth) for r in CAUSAL}


def saved(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """Saved, and loaded once more."""
    base.save_pretrained(zoo.folder / "saved")
    return roles_apart(zoo, zoo.shared(zoo.folder / "saved"), "rollout")


def merged(zoo: Zoo, base: SharedBase) -> dict[str, float] | str:
    """The saved policy as PEFT loads it, and merged into a plain model; a sentence where PEFT loads, or merges, another
    function than the adapter that it saved itself."""
    with torch.no_grad():
        again = PeftModel.from_pretrained(load_base(zoo.base_folder), zoo.folder / "policy").eval()
        lost = distance(_completions(zoo, again), zoo.said["policy"])
    if lost > LIMITS["output"]:
        return f"PEFT loads only a part of an adapter that it saved ({lost:.2g} nats off); SharedBase loads all of it"
    if not (zoo.folder / "saved" / "policy").exists():
        base.save_pretrained(zoo.folder / "saved")
    ids, mask, columns = batch_of(zoo.rows, "rollout")
    with torch.no_grad():
        said = tail(base.logprobs(ids, mask, columns), mask, columns)
        model = PeftModel.from_pretrained(load_base(zoo.base_folder), zoo.folder / "saved" / "policy").eval()
        loaded, model = _completions(zoo, model), model.merge_and_unload().eval()
        found = {"loaded": distance(said, loaded), "merged": distance(said, _completions(zoo, model))}
    own = distance(loaded, _completions(zoo, model))
    if own > LIMITS["output"] and found["loaded"] <= LIMITS["output"]:
        return f"merging with PEFT changes the function (by {own:.2g} nats)"
    return found


@torch.no_grad()
def _completions(zoo: Zoo, model: nn.Module) -> list[Tensor]:
    return [logprobs_of(model, row)[-c:] for row, (_, c) in zip(zoo.rows, ROWS, strict=True)]


def classifier(zoo: Zoo, base: SharedBase) -> dict[str, float] | str:
    """The saved reward role as PEFT loads it, over the family's own sequence classifier."""
    if not (zoo.folder / "saved" / "reward").exists():
        base.save_pretrained(zoo.folder / "saved")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = AutoModelForSequenceClassification.from_pretrained(
                zoo.base_folder, num_labels=1, dtype=torch.float32
            )
            if not isinstance(getattr(alone, "score", None), nn.Linear):
                return f"{type(alone).__name__} has no linear score head"
            model = PeftModel.from_pretrained(alone, zoo.folder / "saved" / "reward").eval()
            with torch.no_grad():
                truth = [logits_of(model, ids)[None, 0] for ids in zoo.rows]
    except Exception as error:
        return sentence(error)
    ids, mask, _ = batch_of(zoo.rows, "right")
    return {"reward": distance(list(base.scores(ids, mask)[:, None]), truth)}


def two_updates(zoo: Zoo, base: SharedBase) -> dict[str, float]:
    """PPO with the reward role: before the first step on a rollout the policy is the one that wrote it."""
    before = {n: p.detach().clone() for n, p in base.named_parameters() if p.requires_grad}
    args = PPOConfig(
        output_dir=str(zoo.folder / "run"), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, num_mini_batches=1, num_ppo_epochs=1, gradient_checkpointing=False,
        max_completion_length=6, logging_steps=1, disable_tqdm=True, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False,
        generation_kwargs={"suppress_tokens": [configs.PAD]},  # as in `generated`
    )  # fmt: skip
    trainer = PPOTrainer(
        model=base, args=args, train_dataset=ppo.prompts(16),
        processing_class=tiny.make_tokenizer(zoo.config.get_text_config().vocab_size),
    )  # fmt: skip
    trainer.train()
    first = [
        abs(line["policy/first_approxkl"]) for line in trainer.state.log_history if "policy/first_approxkl" in line
    ]
    if len(first) != 2:
        raise AssertionError(f"{len(first)} of 2 updates were logged")
    moved = [n for n, p in base.named_parameters() if n in before and not torch.equal(before[n], p)]
    if not any("lora_" in n for n in moved) or not all(math.isfinite(float(p.sum())) for p in base.parameters()):
        raise AssertionError("the updates left the policy where it was, or not finite")
    return {"first_approxkl": max(first)}


def tie_flipped(zoo: Zoo) -> dict[str, float] | str:
    """The same family with tied word embeddings where it has untied ones, or the other way round."""
    config = copy.deepcopy(zoo.config)
    text = config.get_text_config()
    config.tie_word_embeddings = text.tie_word_embeddings = not getattr(text, "tie_word_embeddings", True)
    folder = zoo.folder / "tie"
    try:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        logits_of(load_base(folder), zoo.rows[0])
    except Exception as error:
        return sentence(error)
    return defaults(zoo, folder)


def run(config: Any, folder: Path, report: Callable[[Finding], None]) -> None:
    """Every check of one configuration, each finding reported as it comes."""

    def attempt(name: str, check: Callable[[], Any], limit: float = LIMITS["output"]) -> Any:
        started = time.process_time()
        try:
            found = check()
        except Exception as error:
            if is_refusal(error):
                report(Finding(name, "refused", note=sentence(error).partition(": ")[2]))
            else:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                report(Finding(name, "raw", note=f"{sentence(error)} [{Path(frame.filename).name}:{frame.lineno}]"))
            return None
        if isinstance(found, str):
            report(Finding(name, "absent", note=found))
        elif isinstance(found, dict):
            worst = max(found, key=lambda role: math.inf if math.isnan(found[role]) else found[role])
            said = ", ".join(f"{k} {v:.2g}" for k, v in found.items())
            report(
                Finding(
                    name,
                    "right" if found[worst] <= limit else "wrong",
                    found[worst],
                    said,
                    round(time.process_time() - started, 2),
                )
            )
        return found

    try:
        zoo = build(folder, config)
    except NotPlain as error:
        report(Finding("plain", "absent", note=str(error)))
        if (told := error.zoo) is not None:
            attempt("generation", lambda: generation(told, told.shared()))
        return
    if "longer_changes" in vars(zoo):
        report(Finding("longer", "right", vars(zoo)["longer_changes"], "a longer row changes what stands before"))
    base = attempt("build", zoo.shared)
    if base is None:
        return
    report(Finding("packs", "right", None, str(base.packs)))
    with torch.no_grad():
        truth = zoo.said
    spread = min(distance(truth[r], truth["policy"]) for r in ("reference",))
    report(Finding("spread", "right", spread, "policy against reference: what the comparisons could find"))
    for layout in ("rollout", "left", "right"):
        attempt(f"roles, {layout}", lambda layout=layout: roles_apart(zoo, base, layout))
    attempt("mixed", lambda: roles_mixed(zoo, base))
    attempt("one row", lambda: one_row_each(zoo, base))
    attempt("training forward", lambda: training_forward(zoo, base))
    attempt("gradients", lambda: gradients(zoo, base), LIMITS["gradient"])
    attempt("generation", lambda: generation(zoo, base))
    attempt("completions", lambda: completions(zoo, base))
    attempt("defaults", lambda: defaults(zoo))
    attempt("saved", lambda: saved(zoo, base))
    attempt("merged", lambda: merged(zoo, base))
    attempt("classifier", lambda: classifier(zoo, base))
    attempt("recomputed", lambda: recomputed(zoo, base), LIMITS["gradient"])
    attempt("updates", lambda: two_updates(zoo, base), LIMITS["approxkl"])
    attempt("tie flipped", lambda: tie_flipped(zoo))
    report(Finding("end", "right"))


def as_json(finding: Finding) -> dict[str, Any]:
    """A line of the results."""
    return asdict(finding)


def verdict(findings: list[dict[str, Any]]) -> str:
    """Of a whole family: the worst of its checks. Where plain Transformers cannot train it, a refusal is right."""
    absent = any(f["verdict"] == "absent" and f["check"] in ("plain", "config") for f in findings)
    verdicts = {f["verdict"] for f in findings}
    best = "not trainable" if absent else "right"
    return next((v for v in ("wrong", "raw", *(() if absent else ("refused",))) if v in verdicts), best)
