"""One of two processes on which the seams of a run fail one after the other, each on one process alone;
tests/integration/test_processes.py starts them.

python seams_worker.py FOLDER [FIRST | switches]      # under torchrun; writes FOLDER/outcomes_PROCESS.json

FIRST: leave out as many seams as this says. "switches": nothing fails; a callback on one process alone asks for an end,
a checkpoint, an evaluation or a log.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback

from tests.helpers import saved_model
from tests.integration.test_ppo_trainer import trained_state
from tests.integration.test_seams import (
    AT_ONCE,
    ELSEWHERE,
    SEAMS,
    STEPS,
    TRANSFORMERS_EVENTS,
    Breaks,
    breaking,
    trainer_for,
)
from trl_ext import PPOTrainer, RolloutCallback
from trl_ext.callbacks.rollout import EVENTS
from trl_ext.ppo import trainer as trainer_module
from trl_ext.ppo.failures import FAILURES

# What the main process alone does, and what each does for itself.
OF_MAIN = ["model card", "weights", "state", "tokenizer", "table of completions"]
OF_EACH = [seam for seam in SEAMS if seam.split("'")[0] in ("generator", "objective", "scorer", "roles")]
WITHIN = {
    "rows": ("", "_get_num_items_in_batch"),  # what Transformers calls on the rows that it has just read
    "model": ("base", "forward"),
    "loss": ("updater", "_loss"),  # before DistributedDataParallel's forward
}


def fail_at(seam: str, trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Breaks:
    """Have it fail here."""
    if seam not in EVENTS and seam in SEAMS | WITHIN:
        breaks = breaking(trainer, (SEAMS | WITHIN)[seam], patch)
        breaks.step = 5 if seam == "model" else 4  # in training, not in scoring
        return breaks
    breaks = Breaks(trainer_module.save_completions if seam == "table of completions" else lambda *_, **__: None)
    breaks.trainer = trainer
    if seam == "table of completions":
        patch.setattr(trainer_module, "save_completions", breaks)
        return breaks
    callback = RolloutCallback() if seam in EVENTS else TrainerCallback()
    setattr(callback, seam, lambda *args, **kwargs: breaks(*args, **kwargs))
    trainer.add_callback(callback)
    return breaks


def fresh(folder: Path, **changes: Any) -> PPOTrainer:
    with PartialState().main_process_first():
        saved_model(folder / "model")
    return trainer_for(folder, model=str(folder / "model"), per_device_train_batch_size=2, **changes)


def tried(seam: str, on: int, folder: Path, wanted: dict[str, torch.Tensor] | None) -> str:
    """Train, with `seam` failing on process `on` alone; then go on, where it is known what is `wanted` at the end.

    Returns:
        What is wrong, or 'right'.
    """
    trainer, here = fresh(folder), PartialState().process_index == on
    with pytest.MonkeyPatch.context() as patch:
        breaks = fail_at(seam, trainer, patch) if here else None
        try:
            trainer.train()
        except FAILURES as error:
            said: Any = str(error)
        else:
            return "no failure"
    if breaks is not None and not breaks.failed:
        return "it never came"
    step = trainer.state.global_step
    saved = folder / "out" / f"checkpoint-{step}"
    if "it went away" not in said or f"All {step} steps before are saved in '{saved}'" not in said:
        return said
    progress = json.loads((saved / "ppo_state.json").read_text())["updater"]["progress"]
    whole = {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "rollout.json", "trainer_state.json"}
    if progress["sums"] or not whole <= {path.name for path in saved.iterdir()}:
        return "not whole"
    if wanted is None:
        return "right"
    again = fresh(folder)
    again.train(resume_from_checkpoint=str(saved))
    same = all(torch.equal(tensor, wanted[name]) for name, tensor in trained_state(again).items())
    return "right" if again.state.global_step == STEPS and same else "another run"


def switched(event: str, switch: str, folder: Path) -> list[Any]:
    """Train, with a callback on process 1 alone that sets a switch, once, at `event` of step 2 or later.

    Returns:
        What came of it: whether it was set, the last step, the steps of checkpoints and of evaluations.
    """
    # Of two steps an epoch the first one ends in no event of PPO's.
    trainer, asked = fresh(folder, num_mini_batches=2, total_episodes=32), list[str]()

    def ask(args: Any, state: Any, control: Any, *_: Any, **__: Any) -> None:
        if state.global_step >= 2 and not asked:
            asked.append(event)
            setattr(control, switch, True)

    if PartialState().process_index == 1:
        callback = RolloutCallback() if event in EVENTS else TrainerCallback()
        setattr(callback, event, ask)
        trainer.add_callback(callback)
    trainer.train()
    steps = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_objective/scores" in row]
    return [len(gather_object(asked)), trainer.state.global_step, steps, evaluated]


def switches(folder: Path) -> None:
    """One event after the other asks for the end; and at two of them for everything else."""
    events = [event for event in TRANSFORMERS_EVENTS if event not in ELSEWHERE | AT_ONCE]
    asked = [(event, "should_training_stop") for event in [*events, *EVENTS]]
    others = ("should_save", "should_evaluate", "should_log", "should_epoch_stop", "should_update_stop")
    asked += [("on_optimizer_step", "should_update_stop")]  # which nothing tells the others before it is read
    asked += [(event, switch) for event in ("on_step_end", "on_log") for switch in others]
    outcomes = {}
    for number, (event, switch) in enumerate(asked):
        outcomes[f"{switch} at {event}"] = switched(event, switch, folder / str(number))
        (folder / f"outcomes_{PartialState().process_index}.json").write_text(json.dumps(outcomes))


def main() -> None:
    folder, state = Path(sys.argv[1]), PartialState(cpu=True)
    assert state.num_processes == 2
    if sys.argv[2:] == ["switches"]:
        folder.mkdir(exist_ok=True)
        switches(folder)
        return
    whole = fresh(folder / "whole")
    whole.train()
    wanted = trained_state(whole)
    events = [event for event in TRANSFORMERS_EVENTS if event not in ELSEWHERE | AT_ONCE]
    places = [(seam, 0) for seam in [*OF_MAIN, *events[::2]]]
    places += [(seam, 1) for seam in [*OF_EACH, *WITHIN, *EVENTS, *events[1::2]]]
    outcomes = {}
    for number, (seam, on) in list(enumerate(places))[int(sys.argv[2]) if len(sys.argv) > 2 else 0 :]:
        outcome = tried(seam, on, folder / str(number), wanted if number % 3 == 0 else None)
        outcomes[f"{seam} on {on}"] = outcome
        (folder / f"outcomes_{state.process_index}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
