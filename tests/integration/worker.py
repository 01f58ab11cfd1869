"""One process of a PPO run on a tiny model; tests/integration/test_processes.py starts one of it, or two.

python worker.py MODEL OUT [CHECKPOINT | fail | mute | stream | bad | stop_WHAT]      # beside what torchrun sets

CHECKPOINT: go on from there. "fail": in the first evaluation, on the last process alone. "mute": the yardstick fails,
which the main process alone asks. "stream": the prompts come one by one. "bad": so they do, and one of the second
rollout, which the last process answers, is none. "stop_WHAT": process 1 stops each update, or the training.
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import IterableDataset
from peft import LoraConfig
from safetensors.torch import save_file

from tests.helpers import prompt_dataset, word_tokenizer
from trl_ext import AdaptiveKLCallback, DiagnosticsCallback, PIKLController, PPOConfig, PPOTrainer, RolloutCallback
from trl_ext.callbacks.rollout import PPOControl


def cats(completions: list[str], prompts: list[str], **_: object) -> list[float]:
    """Say cat."""
    state = PartialState()
    if sys.argv[3:] == ["fail"] and len(prompts) < 8 and state.is_last_process:
        raise ConnectionResetError("the judge went home")
    return [float(text.split().count("cat")) - 0.1 * len(text) for text in completions]


def judged(completions: list[str], **_: object) -> list[float]:
    """What each call of costs money."""
    if not PartialState().is_main_process or sys.argv[3:] == ["mute"]:
        raise ConnectionResetError("nobody pays this judge")
    return [float(len(set(text.split()))) for text in completions]


def short(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """Short answers, those of even length alone."""
    return [-0.2 * len(ids) if len(ids) % 2 == 0 else None for ids in completion_ids]


class Stops(RolloutCallback):
    """One process asks for the end of what `what` says."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_rollout_end(self, args: object, state: object, control: PPOControl, **_: object) -> None:
        if PartialState().process_index == 1:
            setattr(control, f"should_{self.what}_stop", True)


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    processes = PartialState(cpu=True).num_processes
    args = PPOConfig(
        str(out),
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=32 * 4,
        max_completion_length=6,
        generation_kwargs={"do_sample": False},  # the same answers however prompts are dealt out
        score_normalization="running",
        whiten_rewards=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        missing_eos_penalty=0.3,
        eval_strategy="steps",
        eval_steps=8,
        per_device_eval_batch_size=4 // processes,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="steps",
        save_steps=10,
        disable_tqdm=True,
    )
    prompts = prompt_dataset(70)
    stream = prompts.to_iterable_dataset().shuffle(seed=1, buffer_size=20)
    rows = [*stream.take(60), {"prompt": 7, "animal": "cat"}]
    bad = IterableDataset.from_generator(lambda: iter(rows))
    given = {"stream": stream, "bad": bad}.get(sys.argv[-1], prompts)
    trainer = PPOTrainer(
        model,
        [cats, short],
        args,
        given,
        prompts.select(range(5)),  # uneven, for two processes and for batches of four
        word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[
            AdaptiveKLCallback(PIKLController(init=0.1, target=0.5, horizon=64)),
            DiagnosticsCallback(yardstick=judged),
        ],
    )
    if sys.argv[-1].startswith("stop_"):
        trainer.add_callback(Stops(sys.argv[-1].removeprefix("stop_")))
    trainer.train(resume_from_checkpoint=next((word for word in sys.argv[3:] if "checkpoint" in word), None))
    if trainer.is_world_process_zero():
        trained = {name: p.detach().clone() for name, p in trainer.base.named_parameters() if p.requires_grad}
        save_file(trained, out / "trained.safetensors")
        (out / "logs.json").write_text(json.dumps([processes, trainer.state.log_history]), encoding="utf-8")


if __name__ == "__main__":
    main()
