"""Where the demo lies on disk: built once, and never half."""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from dataclasses import asdict
from functools import cache
from pathlib import Path

from datasets import Dataset
from filelock import FileLock

from trl_ext.demo import data, model

SOURCES = ("world.py", "grading.py", "data.py", "model.py", "reward.py")
DATA_SEED = 0
DONE = "recipe.json"  # written last


def build(cache_dir: str | Path | None = None, recipe: model.Recipe = model.RECIPE) -> Path:
    """The demo's folder, with ``model/`` and ``data/``; built first where it is not there yet (about 40 s on 2 cores).

    ``cache_dir`` defaults to the environment variable ``TRL_EXT_CACHE``, then to ``~/.cache/trl_ext``. The folder's
    name carries a digest of the recipe and of the code that makes it, so a changed demo is another folder. Processes
    that build at once wait for the first; a build that is interrupted leaves nothing behind that counts as a demo.
    """
    folder = _cache(cache_dir) / f"demo-{_digest(recipe)}"
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_complete(folder):
            _build_into(folder, recipe)
    return folder


def model_path(cache_dir: str | Path | None = None) -> str:
    """The folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load; built first where needed."""
    return str(build(cache_dir) / "model")


def load(name: str, split: str | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """One of the demo's data sets, in TRL's conversational formats.

    - ``prompts`` (train, test): ``prompt, country, capital``, the last two for reward functions;
    - ``pairs`` (train, test): ``prompt, chosen, rejected, chosen_rating, rejected_rating``;
    - ``ratings`` (train, test): ``prompt, completion, rating, rater``, ratings whole numbers from 1 to 5;
    - ``exam`` (test): ``prompt, country, capital, covered``.

    ``split`` defaults to the first of those named. Train has the covered countries in the feedback's phrasings, test
    the phrasings held out. Raises ValueError for a name or split that there is not, naming those that there are.
    """
    if name not in data.SPLITS:
        raise ValueError(f"no demo data set {name!r}; there are {', '.join(data.SPLITS)}")
    split = data.SPLITS[name][0] if split is None else split
    if split not in data.SPLITS[name]:
        raise ValueError(f"demo data set {name!r} has no split {split!r}; it has {', '.join(data.SPLITS[name])}")
    lines = (build(cache_dir) / "data" / f"{name}-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def _build_into(folder: Path, recipe: model.Recipe) -> None:
    print("building the demo model, about 40 s ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        (draft / "data").mkdir(parents=True)
        for name, splits in data.tables(DATA_SEED).items():
            for split, rows in splits.items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (draft / "data" / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")
        model.make(draft / "model", recipe)
        (draft / DONE).write_text(json.dumps(asdict(recipe)) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # an unfinished build
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"built {folder} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def is_complete(folder: Path) -> bool:
    """Whether the build in this folder was finished."""
    return (folder / DONE).is_file()


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or os.environ.get("TRL_EXT_CACHE") or "~/.cache/trl_ext").expanduser()


@cache
def _digest(recipe: model.Recipe) -> str:
    here = Path(__file__).parent
    sources = b"".join((here / source).read_bytes() for source in SOURCES)
    return hashlib.sha256(repr((recipe, DATA_SEED)).encode() + sources).hexdigest()[:12]
