"""What a run gives to the Hub: it is asked beforehand whether it can push, and it writes a model card."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, get_token

from trl_ext import runs
from trl_ext.diagnostics import RunLog

METHODS = {
    "ppo": "[PPO](https://huggingface.co/papers/1909.08593)",
    "dpo": "[DPO](https://huggingface.co/papers/2305.18290)",
}
LOADERS = {"reward": ("AutoPeftModelForSequenceClassification", ", num_labels=1")}
# The figures of a run: what they are called here, and in `RunLog`.
FIGURES = {
    "ppo": {"score": "score", "KL, nats per completion": "kl", "completion length, tokens": "length"},
    "reward": {"loss": "loss", "accuracy": "accuracy"},
    "dpo": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
}
# Settings that say how a run went about it. No folder is among them: a card is for others.
SETTINGS = (
    *("objective", "beta", "learning_rate", "max_steps", "total_episodes", "num_train_epochs", "rollout_batch_size"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_ppo_epochs", "num_mini_batches", "kl_coef"),
    *("kl_estimator", "cliprange", "vf_coef", "gamma", "lam", "temperature", "max_completion_length", "max_length"),
    *("missing_eos_penalty", "score_normalization", "reward_weights", "bf16", "seed"),
)
TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

A LoRA adapter over {{ base }}, trained with {{ method }} by trl_ext on
[TRL](https://github.com/huggingface/trl){% if dataset %}, on the data set {{ dataset }}{% endif %}.
{% if scores %}
Scored by: {{ scores }}.
{% endif %}
## Load

From the Hub, or in the folder that holds `{{ repo }}`:

```python
from peft import {{ loader }}
from transformers import AutoTokenizer

model = {{ loader }}.from_pretrained("{{ repo }}"{{ arguments }})
tokenizer = AutoTokenizer.from_pretrained("{{ repo }}")
```
{% if figures %}
## The run

| | first | last |
|---|---|---|
{% for name, first, last in figures %}| {{ name }} | {{ first }} | {{ last }} |
{% endfor %}{% endif %}{% if results %}
## Measured afterwards

| | |
|---|---|
{% for name, value in results.items() %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if settings %}
## Settings

| | |
|---|---|
{% for name, value in settings.items() %}| `{{ name }}` | {{ value }} |
{% endfor %}{% endif %}"""


class PickledWithoutSecrets:
    """Settings that are pickled without tokens and keys, as training_args.bin is pushed along with the model. Copies
    have them."""

    def __getstate__(self) -> dict[str, Any]:
        return dict.fromkeys(self.__dict__) | runs.without_secrets(self.__dict__)

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def check_push(args: Any) -> None:
    """Refuse a run that could not push what it trains.

    Raises:
        ValueError: the Hub is switched off, or the main process, which pushes, has no token.
    """
    if args.push_to_hub:
        runs.on_main(partial(_check_push, args))


def _check_push(args: Any) -> None:
    otherwise = "or leave it out, and upload the output folder afterwards with `hf upload`"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub is set, but HF_HUB_OFFLINE switches the Hub off: unset that, {otherwise}.")
    if not (args.hub_token or get_token()):
        raise ValueError(
            f"push_to_hub is set, but there is no token for the Hub: log in with `hf auth login`, or give hub_token, "
            f"{otherwise}."
        )


def write_card(
    folder: Path,
    kind: str,
    log: RunLog,
    base: str,
    args: Any,
    name: str | None = None,
    datasets: Sequence[str] = (),
    tags: str | Sequence[str] | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md into the folder of an adapter. No other folder of this machine is named in it.

    Args:
        kind: "ppo", "reward" or "dpo".
        log: the run so far, with its settings.
        base: name or folder of the base.
        args: the trainer's.
        name: of the model; None: that of its repository, or of its folder.
        datasets: names on the Hub.
        tags: one or several, beside our own.
        results: what was measured after the run.
    """
    tags = [tags] if isinstance(tags, str) else tags or ()
    repo, on_hub = args.hub_model_id or folder.resolve().name, not Path(base).exists()
    loader, arguments = LOADERS.get(kind, ("AutoPeftModelForCausalLM", ""))
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=list(datasets) or None,
        library_name="peft",
        pipeline_tag="text-classification" if kind == "reward" else "text-generation",
        model_name=name or repo.split("/")[-1],
        tags=sorted({*tags, "trl", "trl-ext", "lora", kind, *([f"base_model:adapter:{base}"] if on_hub else [])}),
    )
    settings = {name: log.config.get(name) for name in SETTINGS}
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else f"the local model {Path(base).name!r}",
        method=METHODS.get(kind) or f"the objective {log.setting('objective', 'pairwise')!r}",
        dataset=", ".join(f"[{one}](https://huggingface.co/datasets/{one})" for one in datasets),
        scores=", ".join(f"`{one}`" for one in log.names("rewards/", "/std")),
        repo=repo,
        loader=loader,
        arguments=arguments,
        figures=figures(log, kind),
        settings={name: value for name, value in settings.items() if value is not None and value != -1},
        results={name: " ".join(str(value).split()) for name, value in (results or {}).items()},
    )
    card.save(folder / "README.md")


class WritesCard:
    """A trainer whose card is ours: `save_model` writes it, and `create_model_card`, by which others ask for it."""

    args: Any
    is_world_process_zero: Any

    def card_facts(self) -> tuple[str, RunLog, str, Sequence[str]] | None:
        """Kind, log, base and data sets, as `write_card` takes them; None where TRL's card says it all."""
        raise NotImplementedError

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As TRL's, with the figures of the run."""
        facts = self.card_facts()
        if facts is None:
            super().create_model_card(model_name, dataset_name, tags)  # type: ignore[misc]
        elif self.is_world_process_zero():
            kind, log, base, datasets = facts
            datasets = datasets if dataset_name is None else [dataset_name]
            write_card(Path(str(self.args.output_dir)), kind, log, base, self.args, model_name, datasets, tags)

    def save_card(self, folder: Path) -> None:
        """Our card beside what `save_model` has written there."""
        if (facts := self.card_facts()) is not None:
            kind, log, base, datasets = facts
            write_card(folder, kind, log, base, self.args, datasets=datasets)


def push_card(folder: Path, args: Any) -> None:
    """Upload the card alone, where `save_model` has uploaded the rest."""
    api, name = HfApi(token=args.hub_token), args.hub_model_id or folder.resolve().name
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    revision = args.hub_revision
    api.upload_file(path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id=repo, revision=revision)


def figures(log: RunLog, kind: str) -> list[tuple[str, str, str]]:
    """(name, first, last) of what training and evaluations logged."""
    rows = []
    for evals in (False, True):
        for label, name in FIGURES[kind].items():
            if values := log.series(name, evals=evals).values:
                rows.append((f"{label}, held out" if evals else label, f"{values[0]:.4g}", f"{values[-1]:.4g}"))
    return rows


def loaded_from(dataset: Any) -> list[str]:
    """Names on the Hub of the data sets that `dataset` was loaded from."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^@]+)@", str(file)) for file in files]
    return list(dict.fromkeys(match[1] for match in found if match))
