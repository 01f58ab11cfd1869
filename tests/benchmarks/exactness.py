"""What each way of computing costs in exactness: the largest difference in the policy's log-probabilities, in nats.

python tests/benchmarks/exactness.py --model FOLDER [--precision float32 bfloat16 nf4]

The measure is the Transformers model alone: one row at a time, all logits at once, in the same precision. Packing,
tiles of logits and several roles in one forward are on by default. The log-probabilities seen while sampling are never
trained on; the last row says what that would change.
"""

import argparse
from functools import partial

import torch
from score_pass import built
from timing import head, row
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import SharedBase

PROMPT, NEW = 12, 48


def alone(base: SharedBase, ids: Tensor, mask: Tensor) -> Tensor:
    """Each row by itself, without trl_ext: logits, a softmax, a gather."""
    result = torch.zeros(ids.shape[0], NEW)
    with base.use("policy"):
        for i, (words, real) in enumerate(zip(ids, mask.bool(), strict=True)):
            logits = base.model(input_ids=words[real].unsqueeze(0)).logits[0, :-1].float()
            chosen = logits.log_softmax(-1).gather(1, words[real][1:].unsqueeze(1)).squeeze(1)
            answer = int(real[PROMPT:].sum())
            result[i, :answer] = chosen[len(chosen) - answer :].cpu()
    return result


def logprobs(
    base: SharedBase, ids: Tensor, mask: Tensor, packs: bool = False, together: bool = False, grad: bool = False
) -> Tensor:
    """Those of the policy, alone or with the other roles, as trl_ext computes them."""
    base.packs = packs
    with torch.set_grad_enabled(grad):
        outputs = base(ids, mask, NEW, roles=("policy", "reference", "value", "reward") if together else ("policy",))
    return outputs["logprobs"].detach().float().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=["nf4", "float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--cpu", action="store_true")
    chosen = parser.parse_args()
    device = "cpu" if chosen.cpu or not torch.cuda.is_available() else "cuda"
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(chosen.model))
    prompts = torch.randint(5, vocabulary, (chosen.rows, PROMPT), device=device)
    columns: dict[str, dict[str, float]] = {}
    for precision in chosen.precision:
        base = built(chosen.model, precision, device)
        sampled = base.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(
                max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True,
            ),
        )  # fmt: skip
        ids = sampled.sequences
        ends = torch.linspace(PROMPT + 1, PROMPT + NEW, chosen.rows, device=device).long().unsqueeze(1)
        mask = (torch.arange(ids.shape[1], device=device) < ends).long()
        real = mask[:, PROMPT:].bool().cpu()

        policy = partial(logprobs, base, ids, mask)
        with torch.no_grad():
            plain = alone(base, ids, mask)
        seen = torch.stack([step.float().log_softmax(-1) for step in sampled.logits], dim=1)
        ways = {
            "in a batch, by tiles of logits": policy(),
            "packed": policy(packs=True),
            "packed, with three other roles in one forward": policy(packs=True, together=True),
        }
        base.train()
        base.gradient_checkpointing_enable()
        ways["packed, activations recomputed"] = policy(grad=True, packs=True)
        ways["(what was seen while sampling)"] = seen.gather(2, ids[:, PROMPT:, None]).squeeze(2).cpu()
        columns[precision] = {way: float((got - plain)[real].abs().max()) for way, got in ways.items()}
    print(head("", *columns))
    for way in next(iter(columns.values())):
        print(row(way, *(f"{column[way]:.1e}" for column in columns.values())))


if __name__ == "__main__":
    main()
