"""Today's RLOOTrainer, scored by a function."""

import work
from datasets import Dataset
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

from trl_ext.rewards.sentiment import vader_sentiment


def main() -> None:
    given = work.arguments()
    tokenizer = work.tokenizer_of(given.model)
    work.end_completions(given, tokenizer)
    clock = work.Clock()
    args = RLOOConfig(
        f"{given.folder}/out",
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        num_generations=4,
        num_iterations=given.epochs,
        max_steps=given.updates * given.epochs,
        max_completion_length=given.new_tokens,
        beta=0.05,
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant",
        seed=given.seed,
        gradient_checkpointing=False,
        **work.place(given.precision),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        model_init_kwargs=work.weights(given.precision),
    )
    rows = Dataset.from_dict({"prompt": work.prompts(given)})
    trainer = RLOOTrainer(
        model=given.model,
        reward_funcs=vader_sentiment if given.reviews else work.by_length,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(**work.lora(given)),
        callbacks=[work.Updates(clock, given.epochs)],
    )
    if given.reviews:
        return work.learn(trainer, work.Curve(given, "reward", "kl", kl_is_per_token=True))
    clock.around(trainer, "_generate", "generate", then="score")
    clock.around(trainer, "_compute_loss", "train", then="train")
    trainer.train()
    clock.report(given)


if __name__ == "__main__":
    main()
