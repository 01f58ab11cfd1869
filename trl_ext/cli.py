"""The `trl-ext` command: its subcommands and their options. What they do is imported when one of them runs, so that
`--help` starts at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

RECIPES = {
    "ppo": ("ppo_lora", "PPO with LoRA"),
    "reward": ("reward_lora", "train a reward model"),
    "dpo": ("dpo_lora", "DPO with LoRA"),
    "loop": ("rlhf_loop", "judge, learn, improve, and again"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: this process's) and give back the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in RECIPES:
        return int(import_module("trl_ext.commands.recipes").run(RECIPES[arguments[0]][0], arguments[1:]))
    parser = argparse.ArgumentParser(prog="trl-ext", description="RLHF with PPO on one GPU.")
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (recipe, what) in RECIPES.items():
        rooms.add_parser(name, help=f"{what}: the recipe {recipe}.py, with its options")
    _add_demo(rooms)
    _add_feedback(rooms)
    _add_rate(rooms)
    _add_doctor(rooms)
    _add_adapters(rooms)
    _add_evaluation(rooms)
    chosen = parser.parse_args(arguments)
    try:
        file, name = chosen.run
        return int(getattr(import_module(f"trl_ext.commands.{file}"), name)(chosen))
    except KeyboardInterrupt:
        print("trl-ext: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("TRL_EXT_TRACEBACK") or not _is_of_user(error):
            raise
        print(f"trl-ext: error: {' '.join(str(error).split())}", file=sys.stderr)
        print(*getattr(error, "__notes__", []), sep="\n", end="", file=sys.stderr)
        return 1


def _is_of_user(error: Exception) -> bool:
    """Whether the sentence alone says what to do."""
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return True
    from trl_ext.launch.settings import USER_ERRORS  # these and others; imports what trains, which takes seconds

    return isinstance(error, USER_ERRORS)


def _add_demo(rooms: Any) -> None:
    demo = rooms.add_parser("demo", help="judge a tiny model's answers in the browser, and see what it learns of you")
    demo.add_argument("--ratings", type=int, default=60, metavar="N", help="pairs of answers to judge")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="the folder; what is there is gone on with")
    demo.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    demo.add_argument("--no-browser", action="store_true", help="only print the link")
    demo.set_defaults(run=("recipes", "demo"))


def _add_feedback(rooms: Any) -> None:
    about = rooms.add_parser("feedback", help="human feedback").add_subparsers(required=True, metavar="COMMAND")
    check = about.add_parser("check", help="look at a file of feedback before training on it")
    convert = about.add_parser("convert", help="write feedback in any layout as our own JSONL")
    for command in (check, convert):
        command.add_argument(
            "file", help="ratings, rankings, pairs or labels: a file, a saved folder, or a name on the Hub"
        )
        command.add_argument("--form", help="the form or the layout; without it the columns decide")
        command.add_argument("--split", help="of a folder or a data set on the Hub")
        _add_columns(command)
    check.add_argument("--held-out", metavar="FILE", help="feedback for evaluation; shared prompts are counted")
    check.add_argument("--picture", type=Path, metavar="FILE", help="draw the histogram of ratings (.png, .svg, .pdf)")
    check.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    check.set_defaults(run=("feedback", "check"))
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, .jsonl")
    convert.add_argument("--prompts", action="store_true", help="write the prompts alone, each once")
    convert.add_argument("--drop", action="store_true", help="leave out records that cannot be used, and list them")
    convert.set_defaults(run=("feedback", "convert"))
    about.add_parser("layouts", help="the layouts that are recognised").set_defaults(run=("feedback", "layouts"))


def _add_rate(rooms: Any) -> None:
    rate = rooms.add_parser("rate", help="a page on which people judge answers")
    rate.add_argument("answers", nargs="?", help="file of answers, as `trl-ext sample` writes it")
    rate.add_argument("--store", type=Path, required=True, metavar="FILE", help="where judgements go, .sqlite")
    modes = ("stars", "pairs", "ranking", "labels")
    rate.add_argument("--mode", choices=modes, help="what is asked; without it the store's, in a new store stars")
    rate.add_argument("--per-item", type=int, metavar="N", help="how many people judge each item; at first 1")
    rate.add_argument("--repeats", type=float, metavar="SHARE", help="of items that a rater is asked twice; at first 0")
    rate.add_argument("--attention", metavar="FILE", help="feedback whose judgement is known, asked among the rest")
    rate.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's needs a token")
    rate.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    rate.add_argument("--no-browser", action="store_true", help="only print the link")
    rate.add_argument("--export", type=Path, metavar="FILE", help="write the judgements as feedback, .jsonl, and stop")
    rate.set_defaults(run=("rating", "rate"))


def _add_doctor(rooms: Any) -> None:
    doctor = rooms.add_parser("doctor", help="what is wrong with a run, and what cures it")
    doctor.add_argument("run_dir", help="output folder of a trainer of ours or TRL's, with trainer_state.json")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--try", action="store_true", dest="trial", help="fork the run with each remedy and without it")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="a new folder for --try; RUN_DIR-try, beside the run")
    doctor.add_argument("--logs", type=int, metavar="N", help="most logs of a fork (in PPO rollouts); else the run's")
    doctor.add_argument("--strict", action="store_true", help="exit with status 2 where there is a problem")
    doctor.set_defaults(run=("runs", "doctor"))
    explain = rooms.add_parser("explain", help="the page about one of the doctor's problems")
    explain.add_argument("name", help="as the doctor says it, e.g. kl_runs_away")
    explain.set_defaults(run=("runs", "explain"))
    report = rooms.add_parser("report", help="one HTML file about a run, or about two side by side")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output folders, as for doctor")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to; report.html in the first folder")
    report.set_defaults(run=("runs", "report"))


def _add_adapters(rooms: Any) -> None:
    merge = rooms.add_parser("merge", help="write the base with a saved adapter merged into it")
    score = rooms.add_parser("score", help="score a file of answers by a saved reward adapter")
    chat = rooms.add_parser("chat", help="talk to a saved policy")
    for name, command in (("score", score), ("chat", chat)):
        command.add_argument("adapter", help="folder of the adapter")
        command.add_argument("--base", metavar="MODEL", help="name or folder of the base; without it, the adapter's")
        command.set_defaults(run=("adapters", name))
    merge.add_argument("base", nargs="?", help="name or folder of the base; without it, the adapter's")
    merge.add_argument("--policy", required=True, metavar="FOLDER", help="of the adapter; a reward model's too")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the merged model goes")
    merge.set_defaults(run=("adapters", "merge"))
    merge.add_argument("--dtype", default="auto", help="of its weights: auto, float32, bfloat16, float16")
    for command in (score, chat):
        _add_loading(command, "as it was saved" if command is chat else "float32")
    score.add_argument("file", help="rows with 'completion' and, where they have one, 'prompt'")
    score.add_argument("--out", type=Path, required=True, metavar="FILE", help="the same rows with 'score', .jsonl")
    _add_columns(score)
    _add_template(chat)
    chat.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of an answer")
    chat.add_argument("--temperature", type=float, default=1.0, help="of the sampling")


def _add_evaluation(rooms: Any) -> None:
    sample = rooms.add_parser("sample", help="write the answers of one or more policies to a file of prompts")
    evaluate = rooms.add_parser("evaluate", help="lay policies side by side: figures and win rates")
    for name, command in (("sample", sample), ("evaluate", evaluate)):
        command.add_argument("base", help="name or folder of the base, or 'demo'")
        command.add_argument(
            "--policy",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME=FOLDER",
            help="a saved adapter and what to call it; NAME=base is the bare base",
        )
        command.add_argument(
            "--prompts", required=True, metavar="FILE", help="in any form that feedback has; or 'demo'"
        )
        command.add_argument("--per-prompt", type=int, default=1, metavar="N", help="answers of each policy to each")
        command.add_argument(
            "--reward", nargs="+", action="extend", default=[], metavar="FOLDER", help="reward adapters that score"
        )
        command.add_argument(
            "--function", nargs="+", action="extend", default=[], metavar="PATH", help="reward functions, dotted path"
        )
        command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer")
        command.add_argument("--temperature", type=float, default=1.0, help="of the sampling; 0: the likeliest token")
        command.add_argument("--seed", type=int, default=0, help="of the random numbers")
        command.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers at a time")
        _add_loading(command)
        _add_template(command)
        command.add_argument(
            "--vllm_server_base_url", nargs="+", default=[], metavar="URL", help="vLLM servers of the base that sample"
        )
        _add_columns(command)
        command.set_defaults(run=("policies", name))
    sample.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, .jsonl")
    sample.add_argument(
        "--pick", choices=("disagreement", "closeness", "likelihood", "random"), help="keep what is worth rating"
    )
    sample.add_argument("--of", choices=("pairs", "answers"), help="what is picked; without it pairs")
    sample.add_argument("--items", type=int, metavar="N", help="how many are picked")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    evaluate.add_argument("--judge", metavar="JUDGE", help="reward:FOLDER, function:PATH, url:MODEL@URL or people")
    evaluate.add_argument("--rubric", type=Path, metavar="FILE", help="what a language model judges by")
    evaluate.add_argument("--judge-key", metavar="VARIABLE", help="environment variable with the key for the URL")
    evaluate.add_argument("--store", type=Path, metavar="FILE", help="of `trl-ext rate`: people judge, or are compared")


def _add_loading(command: argparse.ArgumentParser, usual: str = "float32") -> None:
    command.add_argument("--load_in_4bit", action="store_true", help="hold the base in 4 bits (NF4)")
    command.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help=f"of the base; else {usual}"
    )


def _add_template(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--chat_template_kwargs",
        type=json_object,
        metavar="JSON",
        help="arguments of the chat template, those that the policy was trained with",
    )


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _add_columns(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *("--columns", "--column"),
        nargs="+",
        action="extend",
        default=[],
        metavar="THEIRS=OURS",
        help="rename columns",
    )


if __name__ == "__main__":
    sys.exit(main())
