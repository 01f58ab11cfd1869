"""What LoRA costs beside the model it adapts: the bare trunk and its LM head, PEFT's own layers, and trl_ext's.

python tests/benchmarks/adapters.py --model FOLDER [--precision float32 bf16 autocast nf4] [--only speed counts step]

speed: seconds of a training forward and backward (policy and value on one trunk), of the same forward without gradient,
and of one step of generation, each relative to the bare trunk. The three take turns. The bare trunk's backward goes
down to the input embeddings, so that it computes the same chain.

counts: the same, counted instead of timed, so that the machine does not matter: aten operations and the bytes that they
write, by kind. Operations that only make another view of a tensor are left out.

step: what an optimizer step of the trainer costs besides its forwards and backwards.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from timing import head, in_turn, row
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, TrainerCallback

from trl_ext import SharedBase
from trl_ext.ppo import trainer as trainer_module
from trl_ext.ppo import update as update_module
from trl_ext.roles import adapted as adapted_module
from trl_ext.roles import base as base_module
from trl_ext.roles import lora
from trl_ext.roles.aligned import AlignedBatch
from trl_ext.roles.lm_head import LMHead
from trl_ext.roles.switching import keep_differentiable

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import ours
import work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = BARE, PEFT, OURS = "bare", "PEFT", "trl_ext"
KINDS = {
    "product": ("mm", "bmm", "addmm", "baddbmm", "linear", "dot", "attention", "gemv_4bit", "gemm_4bit"),
    "copy or cast": ("copy", "clone", "cat", "stack", "index_put"),
    "multiplication": ("mul", "div"),
    "addition": ("add", "sub"),
}

# The three ways ------------------------------------------------------------------------------------------------------


def as_peft(base: SharedBase) -> SharedBase:
    """Every adapted layer with PEFT's own forward."""
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            vars(layer).pop("forward", None)
    return base


def built(model: str, precision: str, rank: int) -> SharedBase:
    """Policy and value on one trunk, every adapter and head random."""
    torch.manual_seed(0)
    policy = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    base = SharedBase.from_pretrained(model, policy=policy, value="head", **work.weights(precision)).to(DEVICE)
    for name, parameter in base.named_parameters():
        if "lora_B" in name or name.startswith("heads"):
            nn.init.normal_(parameter, std=0.02)
    return base


class Way:
    """A Transformers model with an LM head and a value head."""

    causal_lm: Any
    precision: str

    def autocast(self) -> Any:
        """For forwards; backwards run outside, as in trainers."""
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.precision == "autocast")

    def constant(self) -> Any:
        """Around what trains nothing: the steps of one `generate`, the parts of one score pass."""
        return nullcontext()

    def outputs(self, ids: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of completions of `new` tokens."""
        raise NotImplementedError


class Adapted(Way):
    """With adapters."""

    def __init__(self, base: SharedBase, precision: str) -> None:
        self.base, self.causal_lm, self.precision = base, base.causal_lm, precision
        self._kept: Any = None

    @contextmanager
    def constant(self) -> Iterator[None]:
        """See `Way`. What is kept from step to step there is kept here."""
        with self.base.path.constant():
            self.base.path.kept = self._kept = self.base.path.kept if self._kept is None else self._kept
            yield

    def outputs(self, ids: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """See `Way`."""
        outputs = self.base(ids, torch.ones_like(ids), new, roles=("policy", "value"))
        return outputs["logprobs"], outputs["values"]


class Bare(Way):
    """The same without adapters; the input embeddings take a gradient in their place."""

    def __init__(self, model: str, precision: str) -> None:
        self.precision = precision
        self.causal_lm = AutoModelForCausalLM.from_pretrained(model, **work.weights(precision)).to(DEVICE)
        self.causal_lm.requires_grad_(False)
        keep_differentiable(self.causal_lm)
        self.lm_head = LMHead.of(self.causal_lm)
        self.value_head = nn.Linear(self.causal_lm.config.hidden_size, 1, bias=False, device=DEVICE)

    def outputs(self, ids: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """See `Way`."""
        batch = AlignedBatch.of(ids, torch.ones_like(ids), new)
        embedded = self.causal_lm.get_input_embeddings()(batch.ids).requires_grad_(torch.is_grad_enabled())
        hidden = batch.predicting(self.causal_lm.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state)
        logprobs, _ = self.lm_head.logprobs(hidden, batch.targets, 1.0)
        with torch.autocast(DEVICE, enabled=False):
            return batch.padded(logprobs), batch.padded(self.value_head(hidden.float()).squeeze(-1))


def loss_of(way: Way, ids: Tensor, new: int) -> Tensor:
    """Of a training forward."""
    way.causal_lm.train()
    with way.autocast():
        logprobs, values = way.outputs(ids, new)
    return logprobs.mean() + values.mean()


def score(way: Way, ids: Tensor, new: int) -> None:
    """A forward without gradient."""
    with torch.no_grad(), way.autocast(), way.constant():
        way.outputs(ids, new)


def generation(way: Way, ids: Tensor) -> Callable[[], None]:
    """One step of generation: a token a row, all that came before in the cache."""
    cache, how = DynamicCache(), {"use_cache": True, "logits_to_keep": 1}

    def read(part: Tensor) -> None:
        way.causal_lm.eval()
        with torch.no_grad(), way.autocast(), way.constant():
            way.causal_lm(input_ids=part, past_key_values=cache, **how)

    def step() -> None:
        read(ids[:, -1:])
        cache.crop(-1)

    read(ids[:, :-1])
    return step


def ways(precision: str, chosen: argparse.Namespace) -> dict[str, Way]:
    """Bare, PEFT's and ours, in one precision."""
    load = partial(built, chosen.model, precision, chosen.rank)
    return {
        BARE: Bare(chosen.model, precision),
        PEFT: Adapted(as_peft(load()), precision),
        OURS: Adapted(load(), precision),
    }


# Seconds --------------------------------------------------------------------------------------------------------------


def train(way: Way, ids: Tensor, new: int) -> None:
    """A training forward and its backward."""
    loss_of(way, ids, new).backward()


def speed(precision: str, three: dict[str, Way], ids: Tensor, chosen: argparse.Namespace) -> None:
    """Prints seconds, and their ratios to the bare trunk's."""
    work_of: dict[str, Callable[[Way], Callable[[], object]]] = {
        "training forward and backward": lambda way: partial(train, way, ids, chosen.new_tokens),
        "scoring forward": lambda way: partial(score, way, ids, chosen.new_tokens),
        "generation step": lambda way: generation(way, ids),
    }
    for what, prepared in work_of.items():
        took = in_turn({name: prepared(way) for name, way in three.items()}, chosen.repeats)
        ratios = (f"{took[name] / took[BARE]:.2f}" for name in (PEFT, OURS))
        print(row(precision, what, *(f"{took[name]:.4f}" for name in three), *ratios), flush=True)


# Counts ---------------------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Operations, and bytes of what they return, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: defaultdict[str, int] = defaultdict(int)
        self.bytes: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if written and not func.is_view and name not in ("_unsafe_view", "_reshape_alias", "empty", "empty_like"):
            kind = next((kind for kind, names in KINDS.items() if any(_is(name, of) for of in names)), "other")
            self.operations[kind] += 1
            self.bytes[kind] += sum(leaf.numel() * leaf.element_size() for leaf in written)
        return result


def _is(name: str, of: str) -> bool:
    """Whether the operation `name` is an `of`: `mul_`, `_to_copy`, `_scaled_dot_product_flash_attention`..."""
    return of in name.split("_") or name == of


def counts(precision: str, three: dict[str, Way], ids: Tensor, chosen: argparse.Namespace) -> None:
    """Prints operations and bytes, by kind, as on a device that multiplies in bfloat16."""
    lora.multiplies = lambda *_: True
    for name, way in three.items():
        with Counter() as forward:
            loss = loss_of(way, ids, chosen.new_tokens)
        with Counter() as backward:
            loss.backward()
        with Counter() as scoring:
            score(way, ids, chosen.new_tokens)
        step = generation(way, ids)
        with Counter() as generating:
            step()
        phases = {"training forward": forward, "backward": backward, "scoring": scoring, "generation step": generating}
        for phase, counter in phases.items():
            cells = [f"{counter.operations[kind]} ({counter.bytes[kind] / 1e6:.1f})" for kind in (*KINDS, "other")]
            whole = f"{sum(counter.operations.values())} ({sum(counter.bytes.values()) / 1e6:.1f})"
            print(row(precision, phase, name, *cells, whole), flush=True)


# An optimizer step ----------------------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """Seconds of what runs inside an optimizer step, less what else is watched inside of that."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps, self._running, self._since = 0, ["outside"], time.perf_counter()

    def enter(self, name: str) -> None:
        """From now on it is `name`, until `leave`."""
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._running.append(name)
        self._since = now

    def leave(self) -> None:
        """Back to what it was."""
        self.enter("")
        self._running = self._running[:-2]

    def around(self, owner: Any, name: str, label: str) -> None:
        """`owner.name(...)` is `label`."""
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                return plain(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def around_ends(self, owner: Any, name: str, label: str) -> None:
        """Entering and leaving the context `owner.name(...)` is `label`; what happens inside is not."""
        plain = getattr(owner, name)

        @contextmanager
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            self.enter(label)
            with plain(*args, **kwargs) as value:
                self.leave()
                try:
                    yield value
                finally:
                    self.enter(label)
            self.leave()

        setattr(owner, name, timed)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.enter("the trainer's loop")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.leave()
        self.steps += 1


COMPUTING, ROLLOUT, OPTIMIZER = "forwards, losses and backwards", "rollout", "optimizer.step"


def watched() -> Stopwatch:
    """A stopwatch on the trainer's parts, for the rest of this process."""
    watch = Stopwatch()
    updater, trainer = update_module.Updater, trainer_module.PPOTrainer
    for owner, name, label in (
        (updater, "collect", ROLLOUT),
        (updater, "_loss", COMPUTING),
        (updater, "_backward", COMPUTING),
        (torch.cuda, "synchronize", COMPUTING),  # the end of a backward
        (torch.optim.AdamW, "step", OPTIMIZER),
        (SharedBase, "train", "train() and eval()"),
        (updater, "_gradients_finite", "watching gradients"),
        (trainer, "_clip_grad_norm", "watching gradients"),
        (update_module, "gather_object", "gathering"),
        (trainer_module, "gather_object", "gathering"),
        (updater, "_plan", "rows, metrics"),
        (updater, "_note", "rows, metrics"),
        (updater, "begin_step", "rows, metrics"),
        (updater, "finish_minibatch", "rows, metrics"),
        (updater, "end_step", "rows, metrics"),
        (trainer, "log", "rows, metrics"),
    ):
        watch.around(owner, name, label)
    for owner, name in (
        (SharedBase, "use"),
        (adapted_module, "under"),
        (base_module, "under"),
        (update_module, "frozen"),
    ):
        watch.around_ends(owner, name, "switching roles")
    plain = trainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.add_callback(watch)

    trainer.__init__ = init
    return watch


def step(precision: str, watch: Stopwatch, chosen: argparse.Namespace) -> None:
    """Prints the parts of an optimizer step of `peers/ours.py`; the rollout is no part of it."""
    watch.seconds.clear()
    watch.steps = 0
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        task = {"model": chosen.model, "folder": folder, "variant": "head", "precision": precision, "updates": 3}
        task |= {"batch": chosen.rows, "micro_batch": chosen.rows, "new_tokens": chosen.new_tokens, "rank": chosen.rank}
        sys.argv = ["ours.py", *(word for key, value in task.items() for word in (f"--{key}", str(value)))]
        ours.main()
    parts = {name: took for name, took in watch.seconds.items() if name not in ("outside", "", ROLLOUT)}
    whole = sum(parts.values())
    beside = {f"all but {COMPUTING} and {OPTIMIZER}": whole - parts[COMPUTING] - parts[OPTIMIZER]}
    for name, took in (sorted(parts.items(), key=lambda part: -part[1])) + list(beside.items()):
        print(row(precision, name, f"{1000 * took / watch.steps:.2f}", f"{took / whole:.2%}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", nargs="+", choices=work.PRECISIONS, default=["float32"])
    parser.add_argument("--only", nargs="+", choices=["speed", "counts", "step"], default=["speed", "counts", "step"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=12)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    heads = {
        "speed": head("precision", "what", *(f"{way}, s" for way in WAYS), *(f"{way} / {BARE}" for way in WAYS[1:])),
        "counts": head("precision", "phase", "way", *(f"{kind}: operations (MB)" for kind in (*KINDS, "other", "all"))),
        "step": head("precision", "part of a step", "ms", "share"),
    }
    for part in chosen.only:
        print(f"\n{heads[part]}")
        watch = watched() if part == "step" else Stopwatch()
        for precision in chosen.precision:
            if part == "step":
                step(precision, watch, chosen)
                continue
            three = ways(precision, chosen)
            size = (chosen.rows, chosen.prompt + chosen.new_tokens)
            ids = torch.randint(5, three[BARE].causal_lm.config.vocab_size, size, device=DEVICE)
            {"speed": speed, "counts": counts}[part](precision, three, ids, chosen)


if __name__ == "__main__":
    main()
