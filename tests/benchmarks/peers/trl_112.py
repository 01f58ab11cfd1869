"""TRL 1.12's own PPOTrainer: a LoRA policy, and a value and a reward model of their own, as in its example script.

Variants: full (all of the value model is trained, as there), lora (LoRA on the value model too, as 4 bits need it). All
three models are in the same precision.
"""

from typing import Any

import trl.experimental.ppo.ppo_trainer as module
import work
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    given = work.arguments()
    tokenizer = work.tokenizer_of(given.model)
    work.end_completions(given, tokenizer)
    clock = work.Clock()
    how = work.weights(given.precision)
    policy = AutoModelForCausalLM.from_pretrained(given.model, **how)
    value = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1, **how)
    if given.reviews:
        reward = sentiment_model(tokenizer, policy)
    else:
        reward = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1, **how)
    if given.variant == "lora":
        # TRL reads the backbone under `base_model_prefix` of the model inside PEFT's wrapper.
        value = get_peft_model(value, LoraConfig(**work.lora(given, "SEQ_CLS"))).base_model.model
    ids = tokenizer(work.prompts(given))["input_ids"]
    rows = Dataset.from_dict({"input_ids": ids})
    args = PPOConfig(
        f"{given.folder}/out",
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
        num_ppo_epochs=given.epochs,
        total_episodes=given.batch * given.updates,
        response_length=given.new_tokens,
        stop_token="eos",
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant",
        seed=given.seed,
        temperature=1.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        **work.place(given.precision),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(min(8, given.batch))),
        peft_config=LoraConfig(**work.lora(given)),
        callbacks=[work.Updates(clock)],
    )
    if given.reviews:
        return work.learn(trainer, work.Curve(given, "objective/scores", "objective/kl"))
    clock.around(module, "batch_generation", "generate", then="score")
    accumulate = trainer.accelerator.accumulate

    def training(*models: Any) -> Any:
        clock.enter("train")
        return accumulate(*models)

    trainer.accelerator.accumulate = training
    trainer.train()
    clock.report(given)


def sentiment_model(tokenizer: Any, policy: Any) -> Any:
    """The sentiment lexicon in the shape of a reward model."""
    from trl_ext.interop import RewardModule
    from trl_ext.rewards import vader_sentiment

    return RewardModule(vader_sentiment, tokenizer, policy)


if __name__ == "__main__":
    main()
