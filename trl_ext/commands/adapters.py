"""`trl-ext merge`, `score` and `chat`."""

from __future__ import annotations

import json
from argparse import Namespace

from trl_ext.commands.files import check_new
from trl_ext.feedback.reading import renaming
from trl_ext.launch import load_texts, trained


def merge(chosen: Namespace) -> int:
    difference = trained.merge(chosen.policy, chosen.out, chosen.base, chosen.dtype)
    print(f"{chosen.out} (at most {difference:.1g} from the adapter on its base)")
    return 0


def score(chosen: Namespace) -> int:
    check_new(chosen.out)
    rows = load_texts(chosen.file).rename_columns(renaming(chosen.columns))
    scores = trained.score(chosen.adapter, rows, chosen.base, chosen.load_in_4bit, dtype=chosen.dtype)
    scored = ({**row, "score": score} for row, score in zip(rows, scores, strict=True))
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in scored)
    chosen.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(scores)} scores, mean {sum(scores) / len(scores):.3g}, in {chosen.out}")
    return 0


def chat(chosen: Namespace) -> int:
    def ask() -> str | None:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            return None

    print("Say something; /new begins anew, an empty line ends.")
    sampling = {"max_new_tokens": chosen.max_new_tokens, "temperature": chosen.temperature}
    how = chosen.base, chosen.load_in_4bit, chosen.dtype, chosen.chat_template_kwargs
    trained.chat(chosen.adapter, ask, *how, **sampling)
    return 0
