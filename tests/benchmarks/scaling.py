"""What a PPO update of four roles takes in memory, from a model's shape: the tables of docs/scaling.md.

python tests/benchmarks/scaling.py      # prints them

Roles: LoRA of rank 16 on every linear layer for policy, value and reward; the reference is the bare base. Each GPU
answers and trains on 8 rows of 1,024 tokens at a time, activations are recomputed. Nothing is measured here: the one
figure to hold it against is that of `large_models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, RANK = 2**30, 16
ROWS, TOKENS = 8, 1024
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, and scales of 64 weights that are quantised themselves
NF4_PLAIN = 0.5 + 4 / 64  # scales in float32
BF16 = 2.0
TRAINED = 16  # bytes a trained weight: itself, its gradient, two moments, float32 each
ALLOWANCE = 1.5 * GIB  # CUDA's own, and what the allocator cannot use
SIZES = (24, 48, 80)  # GB of a GPU
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """A decoder: sizes of its layers, how many there are, and whether embeddings and LM head are one."""

    hidden: int
    inner: int
    layers: int
    key_values: int  # width of keys, and of values
    vocabulary: int

    @property
    def products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear layers."""
        h, i, kv = self.hidden, self.inner, self.key_values
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    @property
    def layer(self) -> int:
        """Weights of a layer's linear layers."""
        return sum(inputs * outputs for inputs, outputs in self.products)

    @property
    def ends(self) -> int:
        """Weights of embeddings and LM head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def adapter(self) -> int:
        """Weights of a role's adapter."""
        return RANK * self.layers * sum(inputs + outputs for inputs, outputs in self.products)


MODELS = {
    "8B (Llama 3)": Shape(4096, 14336, 32, 1024, 128_256),
    "14B (Qwen2.5)": Shape(5120, 13824, 48, 1024, 152_064),
    "32B (Qwen2.5)": Shape(5120, 27648, 64, 1024, 152_064),
    "70B (Llama 3)": Shape(8192, 28672, 80, 1024, 128_256),
}


def base_bytes(shape: Shape, weight: float) -> float:
    """The base: linear layers at `weight` bytes a weight, embeddings and LM head in bfloat16."""
    return shape.layers * shape.layer * weight + shape.ends * BF16


def role_bytes(shape: Shape) -> float:
    """Policy and value, which are trained, and the reward role, which is not."""
    return shape.adapter * (2 * TRAINED + 4)


def work_bytes(shape: Shape, rows: int = ROWS, tokens: int = TOKENS) -> float:
    """What an update computes with: keys and values while it answers, or activations while it trains (the states
    between layers, bfloat16, all of one layer's, and its largest weight in bfloat16), whichever is more."""
    width = rows * tokens
    cache = width * shape.layers * 2 * shape.key_values * BF16
    inside = width * (6 * shape.hidden + 4 * shape.inner) * BF16
    activations = width * shape.layers * shape.hidden * BF16 + inside + shape.hidden * shape.inner * BF16
    return max(cache, activations)


def each_whole(shape: Shape, weight: float, rows: int = ROWS) -> float:
    """Bytes a GPU where each has all of the base (one GPU, or DistributedDataParallel)."""
    return base_bytes(shape, weight) + role_bytes(shape) + work_bytes(shape, rows)


def shared_out(shape: Shape, weight: float, gpus: int, rows: int = ROWS) -> float:
    """Bytes a GPU under FSDP2: its part, and what is gathered at a time: embeddings, LM head and two layers."""
    gathered = shape.ends * BF16 + 2 * (shape.layer * weight + 3 * shape.adapter * 4 / shape.layers)
    part = (base_bytes(shape, weight) + role_bytes(shape)) / gpus
    return part + (gathered if gpus > 1 else 0.0) + work_bytes(shape, rows)


def while_loading(shape: Shape, weight: float) -> float:
    """Bytes that each process has of the base before it is shared out: of a quantised one on its GPU, else of the
    machine's memory."""
    return base_bytes(shape, weight)


def choice(shape: Shape, size: int) -> str:
    """The simplest that fits into GPUs of `size` GB, with one row at a time where eight do not fit."""
    room = size * 1e9 - ALLOWANCE
    for rows in (ROWS, 1):
        how = f", {rows} row at a time" if rows == 1 else ""
        if each_whole(shape, NF4, rows) <= room:
            return f"4 bits on each GPU{how}"
    if while_loading(shape, NF4) <= room:
        for rows in (ROWS, 1):
            how = f", {rows} row at a time" if rows == 1 else ""
            gpus = next((n for n in COUNTS[1:] if shared_out(shape, NF4, n, rows) <= room), None)
            if gpus is not None:
                return f"4 bits, FSDP2 over {gpus}{how}"
    return "does not fit: 4 bits are loaded whole"


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def tables() -> str:
    """Both tables of docs/scaling.md."""
    gib = "{:.1f}".format
    figures = [
        [
            name,
            *(gib(base_bytes(shape, weight) / GIB) for weight in (NF4, BF16)),
            gib(role_bytes(shape) / GIB),
            gib(work_bytes(shape) / GIB),
            *(gib(each_whole(shape, weight) / GIB) for weight in (NF4, BF16)),
            *(gib(shared_out(shape, NF4, gpus) / GIB) for gpus in (2, 4, 8)),
            *(gib(shared_out(shape, BF16, gpus) / GIB) for gpus in (4, 8)),
        ]
        for name, shape in MODELS.items()
    ]
    head = ["GiB a GPU", "base, 4 bits", "base, bf16", "roles", "8 rows of 1,024", "all, 4 bits", "all, bf16"]
    head += [f"4 bits, FSDP2 over {gpus}" for gpus in (2, 4, 8)] + [f"bf16, FSDP2 over {gpus}" for gpus in (4, 8)]
    chosen = [[name, *(choice(shape, size) for size in SIZES)] for name, shape in MODELS.items()]
    return table(head, figures) + "\n\n" + table(["", *(f"GPUs of {size} GB" for size in SIZES)], chosen) + "\n"


if __name__ == "__main__":
    print(tables())
