"""PPO with LoRA: policy, reference, value and reward are four roles over one base.

accelerate launch recipes/ppo_lora.py                                    # the embedded default, see ppo_lora.yaml
accelerate launch recipes/ppo_lora.py --load_in_4bit
accelerate launch recipes/ppo_lora.py --config recipes/configs/ppo_smollm2.yaml --learning_rate 5e-5
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from trl_ext import AdaptiveKLCallback, AdaptiveKLController, DiagnosticsCallback, PPOConfig, PPOTrainer, demo, launch


@dataclass
class PPOArguments(launch.DataArguments):
    """What this recipe needs beside PPOConfig and TRL's ModelConfig."""

    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Reward functions by dotted path, or reward models by name; no adapter then."}
    )
    reward_adapter: list[str] | None = field(
        default=None, metadata={"help": "Folder that recipes/reward_lora.py wrote, or 'demo'; see reward_ensemble."}
    )
    value: str = field(default="adapter", metadata={"help": "'adapter', 'head', or a folder to start it from."})
    reference_adapter: str | None = field(
        default=None, metadata={"help": "A frozen adapter as reference; 'copy': the policy's; None: the model named."}
    )
    policy_adapter: str | None = field(default=None, metadata={"help": "A saved adapter to start from; None: new."})
    kl_target: float | None = field(
        default=None, metadata={"help": "KL to hold, nats per completion: kl_coef adapts, beginning where it is set."}
    )
    kl_horizon: float = field(default=1000, metadata={"help": "Episodes over which kl_coef adapts."})
    yardstick: str | None = field(default=None, metadata={"help": "The doctor's better judge, by dotted path."})
    ptx_dataset: str | None = field(default=None, metadata={"help": "Texts (column 'text') for ptx_coef's term."})


TYPES = (PPOArguments, PPOConfig, ModelConfig)


def make_trainer(script: PPOArguments, args: PPOConfig, model_args: ModelConfig) -> PPOTrainer:
    """What is trained; `trl-ext doctor --try` makes it too."""
    functions = launch.import_functions(script.reward_funcs) if script.reward_funcs else None
    train, test = launch.load_rows(script, "prompts")
    model = launch.named_model(model_args)
    tokenizer = model.load_tokenizer(args.trust_remote_code)
    texts = launch.load_texts(script.ptx_dataset) if script.ptx_dataset else None
    launch.check_run(args, train, test, tokenizer, functions or [], model.base, texts)
    yardstick = launch.import_functions([script.yardstick])[0] if script.yardstick else None
    callbacks = [DiagnosticsCallback(yardstick=yardstick)]
    if script.kl_target is not None:
        callbacks += [AdaptiveKLCallback(AdaptiveKLController(args.kl_coef, script.kl_target, script.kl_horizon))]
    roles = {"policy": script.policy_adapter} if script.policy_adapter else {}
    roles |= {"value": script.value, "reference": script.reference_adapter}
    roles["reward"] = launch.reward_folder(script.reward_adapter, functions, model_args)
    base = launch.load_shared_base(model_args, trust_remote_code=args.trust_remote_code, **roles)
    return PPOTrainer(
        base, functions, args, train, test, processing_class=tokenizer, callbacks=callbacks, ptx_dataset=texts
    )


def main() -> None:
    script, args, model_args = launch.parse(__file__, *TYPES)
    trainer = make_trainer(script, args, model_args)
    base, tokenizer, train, test = trainer.base, trainer.processing_class, trainer.train_dataset, trainer.eval_dataset
    launch.show(
        "PPO with LoRA",
        {
            "model": launch.described(model_args, script.policy_adapter),
            "scores": script.reward_funcs or f"reward role ({', '.join(script.reward_adapter)})",
            "roles": ", ".join(f"{role}: {name or 'the bare base'}" for role, name in base.adapters.items()),
            "memory": launch.megabytes(base),
            "data": f"{len(train)} prompts of {script.dataset!r}, {len(test)} held out{script.read_as}",
        },
    )
    prompts, how = test["prompt"][:64], {"chat_template_kwargs": args.chat_template_kwargs}
    how |= {"max_new_tokens": args.max_completion_length, "batch_size": args.local_rollout_forward_batch_size}
    before, outcome = launch.answers(base, tokenizer, prompts[:6], **how), {}
    if script.dataset == "demo":
        outcome["exam before"] = demo.run_exam(base, tokenizer)
    launch.show_progress(trainer)
    held_out = [trainer.evaluate()]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    held_out += [trainer.evaluate()]
    trainer.save_model()
    trainer.save_state()
    launch.show_before_after(prompts[:6], before, launch.answers(base, tokenizer, prompts[:6], **how))
    if script.dataset == "demo":
        outcome["exam after"] = demo.run_exam(base, tokenizer)
    kl = launch.kl_to_reference(base, tokenizer, prompts, **how)
    outcome["KL to the reference"] = f"{kl:.2f} nats per completion"
    outcome["held-out score"] = launch.before_and_after(held_out, "eval_objective/scores")
    launch.report("Result", outcome, args, script)


if __name__ == "__main__":
    with launch.user_errors():
        main()
