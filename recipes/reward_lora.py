"""A reward model as a LoRA adapter, by TRL's RewardTrainer: the reward role that recipes/ppo_lora.py loads.

accelerate launch recipes/reward_lora.py                          # the embedded default, see reward_lora.yaml
accelerate launch recipes/reward_lora.py --load_in_4bit           # for a policy over the same 4-bit base
accelerate launch recipes/reward_lora.py --objective regression   # from ratings instead of pairs
accelerate launch recipes/reward_lora.py --ensemble 4             # four, for several reward roles
"""

from dataclasses import replace
from pathlib import Path

from accelerate.utils import set_seed
from transformers import AutoTokenizer, Trainer
from trl import ModelConfig

from trl_ext import DiagnosticsCallback, FeedbackRewardConfig, FeedbackRewardTrainer, feedback, launch

TYPES = (launch.RewardArguments, FeedbackRewardConfig, ModelConfig)


def make_trainer(script: launch.RewardArguments, args: FeedbackRewardConfig, model_args: ModelConfig) -> Trainer:
    """What is trained, one of an ensemble where there are several; `trl-ext doctor --try` makes it too."""
    data = launch.load_feedback(script, args.objective)
    if script.ensemble > 1:
        set_seed(args.seed)  # each draws a LoRA and a head of its own
    trainer = FeedbackRewardTrainer(
        args=args,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[DiagnosticsCallback()],
        **launch.model_for_trl(replace(model_args, lora_task_type="SEQ_CLS"), args),
    )
    launch.match_precision(trainer, model_args)
    return trainer


def main() -> None:
    script, args, model_args = launch.parse(__file__, *TYPES)
    data = launch.load_feedback(script, args.objective)
    model = launch.named_model(model_args)
    if args.chat_template_path is None:
        tokenizer = model.load_tokenizer(args.trust_remote_code)
        launch.check_written(model.base, tokenizer, args, data.train, data.test)
    launch.show(
        "Reward model with LoRA",
        {
            "model": launch.described(model_args),
            "objective": args.objective,
            "data": f"{len(data.train)} rows of {script.dataset!r}, {len(data.test)} held out{script.read_as}",
        },
    )
    members = launch.members(args, script.ensemble)
    for member in launch.unfinished(members):
        trainer = make_trainer(script, member, model_args)
        launch.show_progress(trainer)
        trainer.train(resume_from_checkpoint=member.resume_from_checkpoint)
        trainer.save_model()
        trainer.evaluate()
        trainer.save_state()
        del trainer  # its base makes room for the next one
        launch.free_memory()

    folders = [member.output_dir for member in members]
    code, rows = {"trust_remote_code": args.trust_remote_code}, args.per_device_eval_batch_size
    tokenizer = AutoTokenizer.from_pretrained(folders[0], **code)
    base = launch.load_shared_base(model_args, policy=model.start, value="head", reward=folders, **code)
    answers = launch.scored_answers(base, tokenizer, data.held_out, rows)
    prompts = launch.distinct_prompts(data.pairs)[:64]
    reference = launch.reference_scores(base, tokenizer, prompts, batch_size=rows)
    judgement = feedback.judge(answers, reference_scores=reference)
    feedback.save_judgement(judgement, Path(args.output_dir), answers, reference)
    on_pairs = judgement
    if data.pairs is not data.held_out:
        on_pairs = feedback.judge(launch.scored_answers(base, tokenizer, data.pairs, rows))
    of_members = launch.show_members(base, tokenizer, data.pairs, rows)
    launch.show_scored_pairs(base, tokenizer, data.pairs.select(range(min(6, len(data.pairs)))))
    launch.report(
        "Result",
        {
            "held-out pair accuracy": on_pairs.shown("pair_accuracy", ".1%"),
            **of_members,
            "held-out loss": f"{launch.held_out_loss(folders):.3f}",
            "rank correlation with people": judgement.shown("spearman", ".2f"),
            "calibration error": judgement.shown("expected_calibration_error", ".3f") + " (see judgement.json)",
            "mean score": f"{judgement.mean:.2f}; the reference's {judgement.shown('reference_mean', '.2f')}",
            "rank correlation with length": judgement.shown("length_correlation", ".2f"),
            "memory": launch.megabytes(base),
        },
        args,
        script,
        members,
    )
    if args.should_save:
        print(f"Use it with recipes/ppo_lora.py --reward_adapter {' '.join(folders)}")


if __name__ == "__main__":
    with launch.user_errors():
        main()
