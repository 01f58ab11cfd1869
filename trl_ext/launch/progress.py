"""One line a log, with the numbers that tell how a run goes; the rest is in trainer_state.json and the report."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

# What is shown, under which name, of what is there.
SHOWN = {
    "objective/scores": "score",
    "objective/kl": "KL",
    "objective/kl_coef": "kl_coef",
    "policy/entropy_avg": "entropy",
    "policy/clipfrac_avg": "clipped",
    "val/explained_variance": "explained",
    "completions/mean_length": "length",
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


class Progress(TrainerCallback):
    """Prints one line a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print what of `SHOWN` is in it; PPO's own sum of losses says nothing, so it is left out there."""
        numbers = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
        hidden = {"loss"} if "objective/kl" in numbers else set()
        shown = {label: numbers[name] for name, label in SHOWN.items() if name in numbers and name not in hidden}
        if state.is_world_process_zero and shown:
            kind = "evaluation" if any(name.startswith("eval_") for name in logs or {}) else "step"
            line = "  ".join(f"{label} {float(value):.3g}" for label, value in shown.items())
            print(f"{kind} {state.global_step}/{state.max_steps}  {line}", flush=True)


def show_progress(trainer: Trainer) -> None:
    """Replace Transformers' progress bar and its printing of whole logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
