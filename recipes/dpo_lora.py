"""Direct preference optimisation with LoRA, by TRL's DPOTrainer: no reward model, no sampling.

accelerate launch recipes/dpo_lora.py                    # the embedded default, see dpo_lora.yaml
accelerate launch recipes/dpo_lora.py --load_in_4bit
"""

from trl import DPOTrainer, ModelConfig

from trl_ext import DiagnosticsCallback, demo, launch

TYPES = (launch.DataArguments, launch.DPOConfig, ModelConfig)


def make_trainer(script: launch.DataArguments, args: launch.DPOConfig, model_args: ModelConfig) -> DPOTrainer:
    """What is trained; `trl-ext doctor --try` makes it too."""
    train, test = launch.load_pairs(script)
    trainer = DPOTrainer(
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=launch.named_model(model_args).load_tokenizer(args.trust_remote_code),
        callbacks=[DiagnosticsCallback()],
        **launch.model_for_trl(model_args, args),
    )
    launch.tell_left_out(len(train), len(trainer.train_dataset), "train_dataset", args.max_length)
    launch.match_precision(trainer, model_args)
    return trainer


def main() -> None:
    script, args, model_args = launch.parse(__file__, *TYPES)
    train, test = launch.load_pairs(script)
    model = launch.named_model(model_args)
    tokenizer = model.load_tokenizer(args.trust_remote_code)
    launch.check_written(model.base, tokenizer, args, train, test, cut=True)
    reference = "the bare base" if model.adapter is None else "a frozen copy of that adapter"
    launch.show(
        "DPO with LoRA",
        {
            "model": launch.described(model_args),
            "data": f"{len(train)} pairs of {script.dataset!r}, {len(test)} held out{script.read_as}",
            "reference": f"{reference}; beta {args.beta}",
        },
    )
    prompts, outcome = launch.distinct_prompts(test)[:64], {}
    how = {"max_new_tokens": 32, "batch_size": args.per_device_eval_batch_size}
    untrained = launch.load_shared_base(model_args, value="head", trust_remote_code=args.trust_remote_code)
    before = launch.answers(untrained, tokenizer, prompts[:6], **how)
    if script.dataset == "demo":
        outcome["exam before"] = demo.run_exam(untrained, tokenizer)
    del untrained  # the trainer loads its own
    launch.free_memory()
    trainer = make_trainer(script, args, model_args)
    launch.show_progress(trainer)
    held_out = [trainer.evaluate()]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    held_out.append(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    del trainer
    launch.free_memory()

    roles = {"policy": args.output_dir, "reference": model.adapter, "value": "head"}
    trained = launch.load_shared_base(model_args, trust_remote_code=args.trust_remote_code, **roles)
    launch.show_before_after(prompts[:6], before, launch.answers(trained, tokenizer, prompts[:6], **how))
    if script.dataset == "demo":
        outcome["exam after"] = demo.run_exam(trained, tokenizer)
    kl = launch.kl_to_reference(trained, tokenizer, prompts, **how)
    outcome |= {
        "held-out loss": launch.before_and_after(held_out, "eval_loss"),
        "held-out pair accuracy": f"{held_out[-1]['eval_rewards/accuracies']:.1%}",
        "KL to the reference": f"{kl:.2f} nats per completion",
        "memory": launch.megabytes(trained),
    }
    launch.report("Result", outcome, args, script)


if __name__ == "__main__":
    with launch.user_errors():
        main()
