"""trl_ext's PPOTrainer. Variants: head (value on the policy's trunk), adapter (a value adapter of its own); after a
comma by_length or sentiment (scored by a function instead of the reward role)."""

from typing import Any

import work
from datasets import Dataset
from peft import LoraConfig

from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase
from trl_ext.rewards.sentiment import vader_sentiment


class Phases(RolloutCallback):
    """Reads the trainer's own clock after every update."""

    def __init__(self, clock: work.Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.steps_per_rollout == 0:
            self.clock.enter("update")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        seconds = {name.removeprefix("time/"): value for name, value in (logs or {}).items() if "time/" in name}
        if seconds:
            self.clock.end_update()
            total = self.clock.updates[-1]["update"]
            train, generate = seconds["train"], seconds["generate"]
            self.clock.updates[-1] = {"generate": generate, "train": train, "score": total - train - generate}


def main() -> None:
    given = work.arguments()
    tokenizer = work.tokenizer_of(given.model)
    work.end_completions(given, tokenizer)
    lora = LoraConfig(**work.lora(given))
    value, _, scored = given.variant.partition(",")
    reward, how = f"{given.folder}/roles/value" if not scored else None, work.weights(given.precision)
    if reward:
        SharedBase.from_pretrained(given.model, policy=lora, **how).save_pretrained(f"{given.folder}/roles")
    base = SharedBase.from_pretrained(given.model, policy=lora, value=value, reward=reward, **how)
    args = PPOConfig(
        f"{given.folder}/out",
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        num_ppo_epochs=given.epochs,
        total_episodes=given.batch * given.updates,
        max_completion_length=given.new_tokens,
        learning_rate=given.learning_rate,
        adam_epsilon=1e-8,  # as the other trainers have it
        seed=given.seed,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        **work.place(given.precision),
        save_strategy="no",
        report_to="none",
        log_completions=False,
        disable_tqdm=True,
    )
    clock = work.Clock()
    functions = {"": None, "by_length": [work.by_length], "sentiment": [vader_sentiment]}[scored]
    rows = Dataset.from_dict({"prompt": work.prompts(given)})
    trainer = PPOTrainer(base, functions, args, rows, None, tokenizer, callbacks=[Phases(clock)])
    if given.reviews:
        work.learn(trainer, work.Curve(given, "objective/scores", "objective/kl"))
    else:
        trainer.train()
        clock.report(given)


if __name__ == "__main__":
    main()
