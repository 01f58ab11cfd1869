"""The numbers that tell how a run goes, and in a notebook their table under Transformers' progress bar."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

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


def shown(logs: dict[str, Any]) -> dict[str, str]:
    """What of `SHOWN` is in a log; PPO's own sum of losses says nothing, so it is left out there."""
    numbers = {name.removeprefix("eval_"): value for name, value in logs.items()}
    hidden = {"loss"} if "policy/entropy_avg" in numbers else set()
    return {label: f"{float(numbers[n]):.3g}" for n, label in SHOWN.items() if n in numbers and n not in hidden}


def show_in_notebook(trainer: Trainer) -> None:
    """Where Transformers shows its table for notebooks, put ours in its place: it has losses alone."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "NotebookProgressCallback":
            trainer.remove_callback(type(callback))
            trainer.add_callback(_notebook_progress())
            return


def _notebook_progress() -> TrainerCallback:
    from transformers.utils.notebook import NotebookProgressCallback  # needs IPython

    class NotebookProgress(NotebookProgressCallback):
        """One row a log."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """No columns yet: the first log brings them."""
            super().on_train_begin(args, state, control, **kwargs)
            self.training_tracker.inner_table = None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """A row of the table; an evaluation's numbers have columns of their own."""
            held_out = ", held out" if any(name.startswith("eval_") for name in logs) else ""
            numbers = {label + held_out: value for label, value in shown(logs).items()}
            if numbers and self.training_tracker is not None:
                self.training_tracker.write_line({"Step": state.global_step, **numbers})

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            """The bar of the evaluation goes."""
            if self.training_tracker is not None:
                self.training_tracker.remove_child()
            self.prediction_bar, self._force_next_update = None, True

    return NotebookProgress()
