"""Adaptive KL in every trainer with a KL penalty: ours, TRL 1.12's PPOTrainer, today's GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerState, TrainingArguments

from trl_ext.callbacks.rollout import RolloutCallback
from trl_ext.controllers import AdaptiveKLController, KLController
from trl_ext.types import Experience

# Not the class's name: Transformers would rebuild a callback of that name from its saved state, without its controller.
ADAPTIVE_KL_STATE = "trl_ext.adaptive_kl"


class AdaptiveKLCallback(RolloutCallback):
    """Lets a KL controller choose the coefficient of the KL penalty.

    It acts through `args.kl_coef` in PPO (trl_ext's and TRL 1.12's PPOTrainer read it anew each rollout). GRPOTrainer
    and RLOOTrainer copy `args.beta` when they are built, so there the callback needs the trainer:

        trainer.add_callback(AdaptiveKLCallback(AdaptiveKLController(init=0.05, target=5.0), trainer=trainer))

    The KL is taken per completion, in nats; GRPOTrainer and RLOOTrainer log it per token, so it is multiplied by the
    mean length that they log beside it. The controller's state is part of the trainer's state: it is saved with every
    checkpoint and comes back when training resumes.

    Args:
        controller: chooses the coefficient; None: `AdaptiveKLController()`, Ziegler et al.'s.
        trainer: a GRPOTrainer or RLOOTrainer; not needed in PPO.
    """

    def __init__(self, controller: KLController | None = None, trainer: Any | None = None) -> None:
        self.controller = controller if controller is not None else AdaptiveKLController()
        if not isinstance(self.controller, KLController):
            raise TypeError(
                f"controller is a {type(self.controller).__name__}: it needs value, update(kl, n), state_dict() and "
                "load_state_dict(state)."
            )
        self._trainer = trainer
        self._in_trl_ext = False
        self._num_completions = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the saved state and set the first coefficient.

        Raises:
            ValueError: this trainer's KL penalty cannot be set: the controller would silently have
                no effect.
        """
        has_beta = hasattr(args, "num_generations") and hasattr(args, "beta")  # GRPOTrainer, RLOOTrainer
        if not hasattr(args, "kl_coef") and not (has_beta and self._trainer is not None):
            reason = (
                "it copies args.beta when it is built, so pass AdaptiveKLCallback(..., trainer=trainer)"
                if has_beta
                else "it has no KL penalty on sampled completions to control"
            )
            raise ValueError(f"AdaptiveKLCallback cannot act in a trainer with {type(args).__name__}: {reason}.")
        if hasattr(args, "kl_coef"):
            self._trainer = None  # it is read from args, whoever was given
        if self._trainer is not None and not getattr(self._trainer, "beta", 0.0):
            raise ValueError(
                f"AdaptiveKLCallback cannot act: the {type(self._trainer).__name__} was built with beta=0 and computes "
                "no KL; set beta in its config to the controller's initial value."
            )
        if getattr(args, "use_liger_kernel", False) and hasattr(self._trainer, "liger_loss"):
            raise ValueError("AdaptiveKLCallback cannot act: Liger's loss copies beta; set use_liger_kernel to False.")
        self._in_trl_ext = hasattr(args, "steps_per_rollout")
        saved = state.stateful_callbacks.get(ADAPTIVE_KL_STATE)
        if saved:
            self.controller.load_state_dict(saved["controller"])
            self._num_completions = float(saved["seen"])
        else:  # in a checkpoint of a run without this callback completions were sampled, too
            self._num_completions = _completions(args, state) if has_beta else 0.0
        self._write(args, state)

    def on_update_end(
        self, args: Any, state: TrainerState, control: Any, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """trl_ext's PPOTrainer: the KL of this rollout sets the coefficient of the next."""
        self.controller.update(metrics["objective/kl"], len(experience.kl))
        self._write(args, state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """TRL's trainers: the KL is read from what they log."""
        logs = logs or {}
        target = getattr(self.controller, "target", None)
        if target is not None and ("objective/kl" in logs or "kl" in logs):
            for row in (logs, *state.log_history[-1:]):
                row["objective/kl_target"] = float(target)
        if self._in_trl_ext:
            return  # on_update_end has done it, with the KL of each rollout
        if "objective/kl" in logs:
            kl, total = float(logs["objective/kl"]), float(logs.get("episode", 0))
        elif logs.get("kl") is not None and "completions/mean_length" in logs:  # None: GRPOTrainer could measure none
            kl, total = float(logs["kl"]) * float(logs["completions/mean_length"]), _completions(args, state)
        else:
            return
        for row in (logs, *state.log_history[-1:]):
            row["objective/kl_coef"] = self.controller.value
        self.controller.update(kl, round(total - self._num_completions))
        self._num_completions = total
        self._write(args, state)

    def _write(self, args: Any, state: TrainerState) -> None:
        state.stateful_callbacks[ADAPTIVE_KL_STATE] = {
            "controller": self.controller.state_dict(),
            "seen": self._num_completions,
        }
        if self._trainer is not None:
            self._trainer.beta = self.controller.value
        else:
            args.kl_coef = self.controller.value


def _completions(args: TrainingArguments, state: TrainerState) -> float:
    """Completions that GRPOTrainer or RLOOTrainer has sampled so far."""
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return state.global_step * a_step / int(getattr(args, "num_iterations", 1))
