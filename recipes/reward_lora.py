"""A reward model as a LoRA adapter, by TRL's RewardTrainer: the reward role that recipes/ppo_lora.py loads.

accelerate launch recipes/reward_lora.py                    # the embedded default, see reward_lora.yaml
accelerate launch recipes/reward_lora.py --load_in_4bit     # for a policy over the same 4-bit base
"""

from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

from trl_ext import SharedBase, launch


def main() -> None:
    script, args, model_args = launch.parse(__file__, launch.DataArguments, RewardConfig, ModelConfig)
    train, test = launch.load_pairs(script)
    model_args.lora_task_type = "SEQ_CLS"
    args.model_init_kwargs = launch.model_kwargs(model_args)
    launch.show(
        "Reward model with LoRA",
        {
            "model": f"{model_args.model_name_or_path}{' in 4 bits' if model_args.load_in_4bit else ''}",
            "data": f"{len(train)} pairs of {script.dataset!r}, {len(test)} held out",
            "LoRA": f"rank {model_args.lora_r} on {model_args.lora_target_modules}",
        },
    )
    trainer = RewardTrainer(
        model=launch.model_name(model_args),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    launch.match_precision(trainer, model_args)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()

    base: SharedBase = launch.load_shared_base(model_args, policy=None, value="head", reward=args.output_dir)
    launch.show_scored_pairs(base, trainer.processing_class, test.select(range(6)))
    launch.report(
        "Result",
        {
            "held-out pair accuracy before": f"{before['eval_accuracy']:.1%}",
            "held-out pair accuracy after": f"{after['eval_accuracy']:.1%}",
            "memory": launch.megabytes(base),
            "saved in": f"{args.output_dir} (use it with recipes/ppo_lora.py --reward_adapter {args.output_dir})",
        },
        args.output_dir,
    )


if __name__ == "__main__":
    with launch.user_errors():
        main()
