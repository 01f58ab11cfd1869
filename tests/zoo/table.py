"""docs/models.md from the zoo's results."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OUTPUTS = ("roles, rollout", "roles, left", "roles, right", "mixed", "one row", "training forward", "saved", "merged")
GRADIENTS = ("gradients", "recomputed")
HEAD = """# Models

What this package does with every model type that `AutoModelForCausalLM` knows, measured.

For each, `tests/zoo` builds a tiny random model and compares the four roles with ordinary Transformers and PEFT models
that read each row alone. It compares:

- log-probabilities, values and scores, with padding on the left, on the right and on both sides, in rows shorter and
  longer than the family's sliding window; every role in a forward of its own, and all in one
- the forward in training, and its gradients with and without recomputation
- what completions were sampled with against what they are scored with
- the saved roles loaded again, and the saved policy merged into its base
- the reward role against the family's own sequence classifier, where it has one
- the same with tied and with untied word embeddings
- two PPO updates, which must begin with `policy/first_approxkl` 0

*Right*: no output differs by more than {output:g} nats, no gradient by more than {gradient:g} of its norm, and
`first_approxkl` is below {approxkl:g}. Float32 explains that much: sums are taken in another order.
*Refused*: the package says in one sentence what it cannot do. *Not trainable*: Transformers and PEFT alone cannot train
this model, or generate with it, on the machine of the test. Where Transformers samples with other probabilities than
the model's own forward gives, this package says so before it samples.

`trl-ext merge` refuses these. PEFT's `merge_and_unload` changes what some of the models say, because some of
their layers read a weight without calling the module that PEFT adapts. The table says where; serve those with their
adapter.

Make the table again with

```sh
python tests/zoo/run.py --out zoo.jsonl --table docs/models.md
```

It takes about {minutes} minutes on one CPU core. An interrupted run goes on where it stopped, unless the code or a
version has changed since. `--floor` adds a column from the results of a run with another Transformers.
"""


def worst(result: dict[str, Any], checks: tuple[str, ...]) -> str:
    """The largest difference in some checks."""
    numbers = [f["difference"] for f in result["findings"] if f["check"] in checks and f["difference"] is not None]
    return f"{max(numbers):.0e}" if numbers else ""


def remark(result: dict[str, Any]) -> str:
    """What is to be known about a model besides its numbers."""
    found = {f["check"]: f for f in result["findings"]}
    if result["verdict"] != "right":
        bad = [f for f in result["findings"] if f["verdict"] in (result["verdict"], "absent")]
        checks = [f for f in bad if f["check"] not in ("recomputed", "classifier", "tie flipped")] or bad
        named = "" if result["verdict"] in ("refused", "not trainable") else f"{checks[0]['check']}: "
        return named + shortened(checks[0]["note"])
    remarks = []
    if found["packs"]["note"] == "False":
        remarks.append("padding is computed: rows cannot be packed")
    if found.get("merged", {}).get("verdict") == "absent":
        remarks.append(found["merged"]["note"])
    if found["recomputed"]["verdict"] == "absent":
        remarks.append("Transformers cannot recompute its activations")
    return "; ".join(remarks)


def shortened(note: str) -> str:
    """A cell of a table."""
    note = re.sub(r"'/[^']*/", "'", note)  # a temporary folder's name is nobody's concern
    note = note.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return note if len(note) <= 200 else note[:200].rsplit(" ", 1)[0] + " ..."


def summary(results: list[dict[str, Any]]) -> str:
    """What was measured with which versions, in a sentence or two."""
    counts = Counter(result["verdict"] for result in results)
    state = results[0]["state"]
    said = ("right", "refused", "wrong", "raw")
    return (
        f"With Transformers {state['transformers']}, PEFT {state['peft']} and PyTorch "
        f"{state['torch'].split('+')[0]}: {len(results)} entries, of which plain Transformers and PEFT can train "
        f"{len(results) - counts['not trainable']}. Of these: "
        + ", ".join(f"{counts[v]} {v}" for v in said if counts[v] or v != "raw")
        + "."
    )


def page(
    results: dict[str, dict[str, Any]],
    order: list[str],
    limits: dict[str, float],
    floor: dict[str, dict[str, Any]] | None = None,
) -> str:
    """The whole page; `floor` holds results with the lowest Transformers, which get a column of their own."""
    done = [results[name] for name in order if name in results]
    minutes = round(sum(result["seconds"] for result in done) / 60 / 5) * 5
    lines = [HEAD.format(minutes=minutes, **limits), summary(done) + "\n"]
    columns = ["Model type", "Class", "Verdict", "Outputs", "Gradients", ""]
    if floor:
        lines.append(summary(list(floor.values())) + "\n")
        columns.insert(3, f"With {next(iter(floor.values()))['state']['transformers']}")
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for result in done:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[result["name"].partition("+")[0]]
        cells = [f"`{result['name']}`", kind, result["verdict"], worst(result, OUTPUTS), worst(result, GRADIENTS)]
        if floor:
            cells.insert(3, floor[result["name"]]["verdict"] if result["name"] in floor else "not in it")
        lines.append("| " + " | ".join([*cells, remark(result)]) + " |")
    return "\n".join(lines) + "\n"


def write(
    path: Path,
    results: dict[str, dict[str, Any]],
    order: list[str],
    limits: dict[str, float],
    floor: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write the page."""
    path.write_text(page(results, order, limits, floor), encoding="utf-8")
