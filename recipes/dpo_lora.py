"""Direct preference optimisation with LoRA, by TRL's DPOTrainer: no reward model, no sampling.

accelerate launch recipes/dpo_lora.py                    # the embedded default, see dpo_lora.yaml
accelerate launch recipes/dpo_lora.py --load_in_4bit
"""

from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from trl_ext import DiagnosticsCallback, demo, launch


def main() -> None:
    script, args, model_args = launch.parse(__file__, launch.DataArguments, DPOConfig, ModelConfig)
    train, test = launch.load_pairs(script)
    args.model_init_kwargs = launch.model_kwargs(model_args)
    name = launch.model_name(model_args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    launch.check_written(name, tokenizer, args, train, test, cut=True)
    launch.show(
        "DPO with LoRA",
        {
            "model": f"{model_args.model_name_or_path}{' in 4 bits' if model_args.load_in_4bit else ''}",
            "data": f"{len(train)} pairs of {script.dataset!r}, {len(test)} held out{script.read_as}",
            "LoRA": f"rank {model_args.lora_r} on {model_args.lora_target_modules}, beta {args.beta}",
        },
    )
    prompts, outcome = launch.distinct_prompts(test)[:64], {}
    how = {"max_new_tokens": 32, "batch_size": args.per_device_eval_batch_size}
    untrained = launch.load_shared_base(model_args, value="head")
    before = launch.answers(untrained, tokenizer, prompts[:6], **how)
    if script.dataset == "demo":
        outcome["exam before"] = demo.run_exam(untrained, tokenizer)
    del untrained  # the trainer loads its own
    launch.free_memory()
    trainer = DPOTrainer(
        model=name,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=[DiagnosticsCallback()],
    )
    launch.tell_left_out(len(train), len(trainer.train_dataset), "train_dataset", args.max_length)
    launch.show_progress(trainer)
    launch.match_precision(trainer, model_args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    del trainer
    launch.free_memory()

    trained = launch.load_shared_base(model_args, value="head", policy=args.output_dir)
    launch.show_before_after(prompts[:6], before, launch.answers(trained, tokenizer, prompts[:6], **how))
    if script.dataset == "demo":
        outcome["exam after"] = demo.run_exam(trained, tokenizer)
    kl = launch.kl_to_reference(trained, tokenizer, prompts, **how)
    outcome |= {
        "KL to the reference": f"{kl:.2f} nats per completion",
        "memory": launch.megabytes(trained),
        "saved in": args.output_dir,
    }
    launch.report("Result", outcome, args.output_dir)


if __name__ == "__main__":
    with launch.user_errors():
        main()
