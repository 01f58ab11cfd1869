"""The whole circle: answers are sampled and judged, a reward model learns, PPO improves the policy, and again.

python recipes/rlhf_loop.py                                # the embedded default, see rlhf_loop.yaml
python recipes/rlhf_loop.py --rater page --output_dir OUT  # you judge, in a browser
python recipes/rlhf_loop.py --rounds 1 --ratings 1200      # all judgements at once
"""

from pathlib import Path

from transformers import Trainer
from trl import ModelConfig

from trl_ext import PPOConfig, launch, loop

TYPES = (loop.LoopArguments, PPOConfig, ModelConfig)


def make_circle(script: loop.LoopArguments, args: PPOConfig, model_args: ModelConfig) -> loop.Circle:
    """What all rounds share."""
    train, test = launch.load_rows(script, "prompts")
    circle = loop.Circle(script, args, model_args, train.to_list(), test.to_list())
    launch.check_run(args, train, test, circle.tokenizer, [], circle.model.base, None)
    return circle


def make_trainer(script: loop.LoopArguments, args: PPOConfig, model_args: ModelConfig, run: Path) -> Trainer:
    """What a round trained into the folder `run`; `trl-ext doctor --try` makes it."""
    return loop.trainer_of(make_circle(script, args, model_args), run)


def main() -> None:
    script, args, model_args = launch.parse(__file__, *TYPES)
    circle = make_circle(script, args, model_args)
    launch.show(
        "The circle",
        {
            "model": launch.described(model_args),
            "rounds": f"{script.rounds} of at most {script.ratings} judgements ({script.mode}, {script.pick})",
            "rater": script.rater,
            "reward models": f"{script.ensemble}, {script.reward_from}; reference: {script.reference}",
            "data": f"{len(circle.train)} prompts of {script.dataset!r}, {len(circle.test)} held out{script.read_as}",
        },
    )
    outcome = loop.run(circle)
    loop.show(outcome.rows)
    print(outcome.ended)
    if outcome.last is not None:
        drawn = (circle.out / "rounds.svg").is_file()
        picture = "rounds.svg draws them." if drawn else "pip install 'trl-ext[feedback]' to have them drawn."
        print(f"The policy is in {outcome.last.ppo}. {circle.out / 'rounds.json'} has the figures; {picture}")


if __name__ == "__main__":
    with launch.user_errors():
        main()
