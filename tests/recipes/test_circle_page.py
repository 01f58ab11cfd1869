"""docs/circle.md, with fewer steps: its commands run in their order, and somebody who knows the truth judges."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FLAGS
from trl_ext import cli, demo
from trl_ext.demo.grading import rating
from trl_ext.rating import Store

PAGE = Path(__file__).parents[2] / "docs" / "circle.md"
FEWER = [
    (r"--num_train_epochs 8", "--max_steps 4"),
    (r'"num_train_epochs": 8', '"max_steps": 4'),
    (r"--total_episodes \d+", "--total_episodes 64"),
    (r"--rounds 3 --ratings 60", "--rounds 1 --ratings 12"),
    (r"--items 120", "--items 40"),
]
TRAINS = ("reward", "ppo", "loop")


def commands() -> list[list[str]]:
    """The words of the page's commands, but for those that install, open the demo or name the base."""
    text = PAGE.read_text(encoding="utf-8")
    for words, fewer in FEWER:
        assert re.search(words, text), words
        text = re.sub(words, fewer, text)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$BASE", demo.model_path()).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("trl-ext") and line != "trl-ext demo"]


def judge_all(capitals: dict[str, str]) -> Callable[..., None]:
    """Judges everything on the page by the truth, and leaves."""

    def stars(prompt: Any, completion: Any) -> int:
        return rating(completion[0]["content"], capitals[prompt[0]["content"]])

    def serve(store: Store, *_: Any, **__: Any) -> None:
        name = store.rater("truth")
        while (shown := store.next(name)) is not None:
            said = [stars(shown.prompt, completion) for completion in shown.completions]
            ranked = tuple(1 + sum(other > own for other in said) for own in said)
            store.judge(name, shown.token, "judged", ranked if store.mode.name == "pairs" else tuple(said))

    return serve


@pytest.mark.long
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    capitals: dict[str, str] = {}
    for file, split, count in (("prompts.jsonl", "train", 72), ("held_out.jsonl", "test", 16)):
        rows = demo.load("prompts", split).to_list()[:count]
        capitals |= {row["prompt"][0]["content"]: row["capital"] for row in rows}
        text = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
        Path(file).write_text(text, encoding="utf-8")
    monkeypatch.setattr("trl_ext.rating.serving.serve", judge_all(capitals))
    asked_first = True
    for program, name, *options in commands():
        assert program == "trl-ext"
        quiet = [*FLAGS, "--disable_tqdm", "true"] if name in TRAINS else []
        status = cli.main([name, *options, *quiet])
        said = capsys.readouterr()
        if name == "evaluate" and asked_first:  # nobody has compared anything yet, as the page says
            assert status == 1 and "No person has compared two policies' answers yet" in said.err
            asked_first = False
        else:
            assert status == 0, said.err
    result = json.loads(Path("runs/evaluation/evaluation.json").read_text(encoding="utf-8"))
    assert result["judge"] == "people" and result["win_rates"]["ppo"]["base"]["n"] > 0
    assert (Path("runs/merged") / "config.json").is_file()
    assert (Path("runs/circle/round_1/ppo") / "adapter_model.safetensors").is_file()
