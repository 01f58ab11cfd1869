"""One line a log, with the numbers that tell how a run goes; the rest is in trainer_state.json and the report."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_ext.callbacks.progress import shown
from trl_ext.ppo import PPOConfig


class Progress(TrainerCallback):
    """Prints what a PPO run's steps are made of, and one line a log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print how many rollouts, epochs and minibatches the steps are."""
        if state.is_world_process_zero and isinstance(args, PPOConfig):
            print(steps_in_words(args, state.max_steps), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print what of it is shown."""
        numbers = shown(logs or {})
        if state.is_world_process_zero and numbers:
            kind = "evaluation" if any(name.startswith("eval_") for name in logs or {}) else "step"
            line = "  ".join(f"{label} {value}" for label, value in numbers.items())
            step = f" {state.global_step}/{state.max_steps}" if state.max_steps else ""  # it is not known before a run
            print(f"{kind}{step}  {line}", flush=True)


def steps_in_words(args: PPOConfig, max_steps: int) -> str:
    """What `max_steps` optimizer steps are: "400 steps = 50 rollouts of 64 completions x 4 epochs x 2 minibatches"."""
    rollouts = _counted(-(-max_steps // args.steps_per_rollout), "rollout", "rollouts")
    completions = _counted(args.rollout_batch_size, "completion", "completions")
    epochs = _counted(args.num_ppo_epochs, "epoch", "epochs")
    minibatches = _counted(args.num_mini_batches, "minibatch", "minibatches")
    return f"{_counted(max_steps, 'step', 'steps')} = {rollouts} of {completions} x {epochs} x {minibatches}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def show_progress(trainer: Trainer) -> None:
    """Replace Transformers' progress bar and its printing of whole logs."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
