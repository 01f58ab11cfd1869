"""How an update grows: time a token and memory with more completions, longer ones, more epochs, a higher rank, a larger
vocabulary, each beside what theory says.

python tests/benchmarks/growth.py --work FOLDER            # prints a table and draws docs/images/growth.svg

A small random Llama; each point is two updates of `peers/ours.py`, the value on the policy's trunk, in a process of its
own, and the second of them counts. Theory for time is the number of multiplications and additions; for memory, beside
the weights: adapters with gradients and moments, a micro-batch's activations, the cache and the logits of one
`generate`, and the rollout. Both lines begin at the first point. It fails where, at the last point, something is above
its line by more than a quarter (memory: of what the line has grown, and 64 MiB more), or has grown from the point
before with an exponent more than 0.25 above theory's. That is generous: what is fixed makes the first point too high.

A run that was interrupted goes on where it was.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ppo_vs_trl import ROOT, run
from timing import PALETTE, device_name, head, panels, read, row, save, write
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import EOS, PAD, word_tokenizer

PICTURE = ROOT / "docs" / "images" / "growth.svg"
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 192, 512, 4, 4
PROMPT, MICRO_BATCH, GENERATED = 11, 8, 64  # tokens; rows of a forward; rows of a `generate`
ACTIVATIONS = 16 * HIDDEN + 6 * INTERMEDIATE  # numbers a token and layer that a backward needs, about


@dataclass(frozen=True)
class Size:
    """What an update is asked for, and what that must cost."""

    completions: int = 64
    tokens: int = 32
    epochs: int = 2
    rank: int = 16
    vocabulary: int = 1024

    @property
    def _adapters(self) -> int:
        """Numbers in the adapters: four projections of attention, three of the MLP."""
        return LAYERS * self.rank * (4 * 2 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))

    @property
    def read(self) -> int:
        """Tokens of an update."""
        return self.completions * (PROMPT + self.tokens)

    @property
    def operations(self) -> float:
        """A token's share of an update's multiplications and additions."""
        length = PROMPT + self.tokens
        layers = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
        attention = LAYERS * HIDDEN * length  # scores and weighted values, half of them masked
        logits = self.vocabulary * HIDDEN * self.tokens / length
        once = layers + self._adapters + attention + logits
        reference = once - self._adapters
        trained = 2 * (layers + attention + logits) + 3 * self._adapters  # forward, and the gradients of inputs
        return 2 * (2 * once + reference + self.epochs * trained)  # generate and the policy's score; reference; train

    @property
    def memory(self) -> float:
        """Bytes beside the weights."""
        length, generated = PROMPT + self.tokens, min(GENERATED, self.completions)
        adapters = 3 * self._adapters  # a gradient and two moments
        activations = MICRO_BATCH * length * LAYERS * (ACTIVATIONS + 7 * self.rank)
        cache = generated * length * LAYERS * 2 * HIDDEN
        logits = 4 * generated * self.vocabulary
        return 4 * (adapters + activations + cache + logits + 20 * self.read)  # ids, masks and numbers of the rollout


AXES = {
    "completions": [replace(Size(), completions=n) for n in (16, 64, 256, 1024)],
    "tokens": [replace(Size(), completions=16, tokens=n) for n in (32, 128, 512, 2048)],
    "epochs": [replace(Size(), epochs=n) for n in (1, 2, 4, 8)],
    "rank": [replace(Size(), rank=n) for n in (4, 16, 64, 256)],
    "vocabulary": [replace(Size(), vocabulary=n) for n in (1024, 4096, 16_384, 65_536)],
}


def model(folder: Path, vocabulary: int) -> Path:
    """A small random Llama and a tokenizer."""
    folder = folder / f"model-{vocabulary}"
    if not (folder / "tokenizer.json").exists():
        tokenizer = word_tokenizer()
        eos, pad = tokenizer.convert_tokens_to_ids([EOS, PAD])
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
        ids = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
        config = LlamaConfig(
            num_attention_heads=HEADS, tie_word_embeddings=True, max_position_embeddings=4096, **sizes, **ids
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def measured(size: Size, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an update, and bytes beside what there was before the trainer."""
    chosen.model = model(chosen.work, size.vocabulary)
    task = {"batch": size.completions, "new_tokens": size.tokens, "epochs": size.epochs, "rank": size.rank}
    one = run((None, "ours.py", "head,by_length", []), chosen, **task, micro_batch=MICRO_BATCH)
    return {"seconds": sum(one["updates"][-1].values()), "bytes": one["peak"] - one["start"]}


class Curve(NamedTuple):
    """One quantity along one axis.

    Attributes:
        at: the axis' values; points: what was measured there; line: what theory says, from the first point on.
    """

    at: list[int]
    points: list[float]
    line: list[float]

    @property
    def exponents(self) -> tuple[float, float]:
        """From the last point but one to the last: measured, theory."""
        grown = math.log(self.at[-1] / self.at[-2])
        measured, theory = (math.log(y[-1] / y[-2]) / grown for y in (self.points, self.line))
        return measured, theory

    def grows_too_fast(self, most: float) -> bool:
        """Whether the last point is above `most`, or the exponent before it too high."""
        measured, theory = self.exponents
        return self.points[-1] > most or measured > theory + 0.25


def curves(axis: str, known: dict[str, Any]) -> tuple[Curve, Curve]:
    """Milliseconds a token, and MiB."""
    sizes = AXES[axis]
    at = [getattr(size, axis) for size in sizes]
    found = [known[str(size)] for size in sizes]
    times = [1000 * one["seconds"] / size.read for one, size in zip(found, sizes, strict=True)]
    sums = [one["bytes"] / 2**20 for one in found]
    by_time = [times[0] * size.operations / sizes[0].operations for size in sizes]
    by_memory = [sums[0] + (size.memory - sizes[0].memory) / 2**20 for size in sizes]
    return Curve(at, times, by_time), Curve(at, sums, by_memory)


def draw(all_curves: dict[str, tuple[Curve, Curve]]) -> None:
    """Both quantities along each axis."""
    from matplotlib.ticker import LogLocator

    figure, axes = panels(2, len(all_curves), sharex="col", sharey="row", figsize=(9, 4.6))
    for column, (name, pair) in enumerate(all_curves.items()):
        for axis, curve in zip(axes[:, column], pair, strict=True):
            axis.loglog(curve.at, curve.line, color=PALETTE[5], linewidth=0.8, linestyle="--", label="theory")
            axis.loglog(curve.at, curve.points, color=PALETTE[0], marker="o", markersize=3, label="measured")
            axis.set_xticks(curve.at, [f"{value:,}" for value in curve.at], fontsize=7)
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
        axes[1][column].set_xlabel(name)
    axes[0][0].set_ylabel("ms a token")
    axes[1][0].set_ylabel("MiB beside the weights")
    axes[0][0].legend(frameon=False, fontsize=8)
    save(figure, PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models, outputs, and what was measured")
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, help="so many of each axis only")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    chosen = parser.parse_args()
    chosen.env, chosen.updates = [], 2
    chosen.work.mkdir(parents=True, exist_ok=True)
    record, too_fast = chosen.work / "growth.json", []
    known = {} if chosen.again else read(record)
    if known.setdefault("device", device_name()) != device_name():
        raise SystemExit(f"{record} is of {known['device']}: give another --work, or --again.")
    print(head("", "from", "to", "ms a token", "theory", "exponent", "MiB", "theory", "exponent"))
    found = {}
    for axis in chosen.only:
        AXES[axis] = AXES[axis][: chosen.points]
        for size in AXES[axis]:
            if str(size) not in known:
                known[str(size)] = {**asdict(size), **measured(size, chosen)}
                write(record, known)
        time, memory = found[axis] = curves(axis, known)
        cells = []
        for curve in (time, memory):
            exponents = "{:.2f} ({:.2f})".format(*curve.exponents)
            cells += [f"{curve.points[0]:.2f} to {curve.points[-1]:.2f}", f"{curve.line[-1]:.2f}", exponents]
        print(row(axis, time.at[0], time.at[-1], *cells), flush=True)
        if time.grows_too_fast(1.25 * time.line[-1]):
            too_fast.append(f"time with {axis}")
        if memory.grows_too_fast(memory.line[-1] + 0.25 * (memory.line[-1] - memory.line[0]) + 64):
            too_fast.append(f"memory with {axis}")
    draw(found)
    if too_fast:
        raise SystemExit(f"grows faster than theory: {', '.join(too_fast)}")


if __name__ == "__main__":
    main()
