"""The score pass: reference, value and reward in one mixed-adapter forward against three forwards one after the other.

python tests/benchmarks/score_pass.py --model FOLDER [--cpu] [--precision nf4 float32 bfloat16]

Prints medians, their ratio, and the largest difference between what both say. The limits up to which trl_ext mixes
adapters are lifted; over a base in half precision it never does, and both columns take the same way.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from timing import head, row, seconds
from transformers import AutoTokenizer, BitsAndBytesConfig

from trl_ext import SharedBase
from trl_ext.roles import adapted

ROLES = ("reference", "value", "reward")


LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


def loaded(precision: str, device: str) -> dict[str, Any]:
    """How a base is loaded: 4 bits are computed with in what the device is good at."""
    dtype = torch.float32 if precision == "float32" or (precision, device) == ("nf4", "cpu") else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": nf4 if precision == "nf4" else None, "device_map": device, "dtype": dtype}


def built(model: str, precision: str, device: str) -> SharedBase:
    """The roles, every adapter and head of them random."""
    how = loaded(precision, device)
    with tempfile.TemporaryDirectory() as folder:
        SharedBase.from_pretrained(model, policy=LORA, **how).save_pretrained(folder)
        base = SharedBase.from_pretrained(model, policy=LORA, reward=Path(folder, "value"), **how)
    for name, parameter in base.named_parameters():
        if "lora_B" in name or name.startswith("heads"):
            torch.nn.init.normal_(parameter, std=0.02)
    return base.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", nargs="+", default=["nf4", "float32"], choices=["nf4", "float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=60, help="a row, 12 of them the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    chosen = parser.parse_args()
    device = "cpu" if chosen.cpu or not torch.cuda.is_available() else "cuda"
    vocabulary = len(AutoTokenizer.from_pretrained(chosen.model))
    adapted.MIXED_TOKENS = adapted.MIXED_TOKENS_QUANTISED = 10**9
    print(head("base", "rows", "three forwards, s", "one forward, s", "ratio", "largest difference"))
    for precision in chosen.precision:
        base = built(chosen.model, precision, device)
        for rows in chosen.rows:
            ids = torch.randint(5, vocabulary, (rows, chosen.tokens), device=device)
            arguments = (ids, torch.ones_like(ids), chosen.tokens - 12)
            apart = {role: base(*arguments, roles=(role,)) for role in ROLES}
            together = base(*arguments, roles=ROLES)
            difference = max(
                float((outputs[name].float() - together[name].float()).abs().max())
                for outputs in apart.values()
                for name in outputs
            )
            three = sum(seconds(partial(base, *arguments, roles=(role,)), chosen.repeats) for role in ROLES)
            one = seconds(partial(base, *arguments, roles=ROLES), chosen.repeats)
            cells = f"{three:.3f}", f"{one:.3f}", f"{one / three:.2f}", f"{difference:.1e}"
            print(row(precision, rows, *cells), flush=True)


if __name__ == "__main__":
    main()
