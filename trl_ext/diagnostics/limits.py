"""The doctor's main thresholds, and where they come from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Thresholds. "Measured" means: between healthy and induced runs of tests/benchmarks/doctor.py. What has no source
    was chosen, so that those healthy runs pass.

    Attributes:
        least_rows: logs (rollouts in PPO) before trends are judged.
        enough: completions from which what nearly all of them share is told without waiting for a third log; chosen.
        sampling_gap_z: standard errors that sampling may stray from scoring, over a whole run: the gap is a martingale
            with mean 0, so 6 is out of reach of chance.
        sampling_told: nats per token by which reported log-probabilities lie below the policy's, on tokens that were
            drawn with the reported ones; chosen, above rounding errors.
        sampling_gap: nats per token that it must stray besides; chosen, above rounding errors.
        negative_kl: nats per completion below 0; the k1 estimate is unbiased and its truth is never negative.
        first_approxkl: nats per token before the first optimizer step on a rollout, in float32: 0 in theory, 1e-13 as
            measured, 1e-4 with LoRA dropout of 0.1.
        first_approxkl_half: the same in half precision: bfloat16 rounds log-probabilities of 10 nats by 0.03, which
            makes 5e-4.
        first_kl: nats per token to the reference before any step, in float32: 0 where both are the same model, in
            theory and as measured; chosen, far below what an adapter from SFT makes.
        first_kl_half: the same in half precision; chosen, above the 0.03 by which bfloat16 rounds.
        no_kl: nats per completion, and their spread, that are none: where policy and reference are one model both are
            0; two that differ by one step of training are far above it (measured).
        kl_per_token: nats per token. Healthy runs here end below 0.2, those that hacked their reward above 0.6
            (measured).
        budget_per_token: nats per token that a completion may spend; kl_coef is suggested so that the penalty for it
            equals the spread of the scores. It gives within a factor of 2 what the recipes use.
        budget: upper bound of that budget, nats per completion; chosen, below the 40 at which Ziegler et al. 2019 lost
            the language.
        stays: share of that budget up to which the policy has not moved.
        drowned: times the suggested kl_coef from which the score no longer counts beside the penalty; and times the
            score's gradient that another term's may have.
        noise_at_start: nats per token in the first rollout above which the model writes noise; a chat model of 135M
            parameters has 0.8 to 4.2 (measured), and to know nothing of a thousand tokens is 6.9.
        entropy: nats per token below which every completion is certain; healthy runs here end above 0.1 (measured).
        entropy_growth: times its start that the entropy rises to; chosen.
        entropy_gain: nats per token by which it rises besides, so that a certain policy may become less so; chosen.
        temperature: sampling below it explains a low entropy.
        clipfrac: share of tokens; PPO's papers and TRL's docs see 0.1 to 0.3 in healthy runs.
        huge_approxkl: nats per token that an update moves the policy; healthy updates stay below 0.3 (measured).
        large_approxkl: the same in half of all updates, or lately where gradients explode; healthy runs stay
            below 0.03 (measured).
        small_approxkl: the same in half of all updates, below which learning is slow; healthy runs make 5e-4 and more
            (measured).
        unspent: share of `budget` (and of `budget_per_token`) up to which the policy has moved little; chosen.
        tiny_approxkl: nats per token that an update moves the policy; healthy updates make 1e-4 and more (measured).
        repeats: second completions of prompts from which copies are judged.
        unlike: second completions, unlike the first, from which the variance within prompts is judged; chosen.
        within_prompt: share of the scores' variance within prompts below which the score ignores the completion: 0 in
            theory, above it for rounding; healthy runs here begin above 0.4 (measured).
        reads_prompt: share by which a score changes under another prompt from which it is taken to look at what was
            asked; chosen.
        noise: share of a function's variance that does not repeat, a mean of several measurements.
        same_again: the same, of a function that does repeat when it is asked again in the same order; chosen.
        noise_alone: the same from which one measurement is enough, and from which it is a problem.
        gradient_noise: times that noise exceeds signal in the gradient of a whole rollout, by squares; chosen.
        unrelated: correlation of score and yardstick over completions up to which the score is for something else;
            chosen.
        in_part: the same up to which it is so only in part, a warning; healthy runs begin above 0.75 (measured).
        missed: of the completions that a yardstick likes best the share that scores no more than the others do; above
            it the score is wrong for some. In healthy runs none does (measured), and a correlation of 0.75 makes 0.04.
        agreement_drop: by which that correlation changes from one rollout to the next; healthy runs stay below 0.2
            (measured).
        agreement_gap: how much lower it is on training prompts than on held-out ones where it is right for these alone;
            chosen; healthy runs stay below 0.02 (measured).
        related: the same of held-out completions from which the score is right for them; chosen.
        misaligned: the same with the yardstick's verdicts on rows some places away, the highest of 64, from which
            scores belong to those; chosen, above the 0.42 of healthy runs (measured).
        alike: share of the completions of the first rollouts that get the same score; chosen.
        unscored: share of the completions that get no score; chosen.
        few_prompts: distinct prompts over those that a rollout has room for; chosen.
        in_order: how much nearer to each other, by rank, neighbouring prompts are than any two; chosen.
        far_off: factor by which a setting is outside its usual range that is told before anything shows; chosen.
        holds: share of the completions that stand in their prompt; chosen: extracts do, answers rarely.
        not_read: share of prompts, or of a template's markers, that the model was not taught to read; chosen.
        other_tokens: share of a model's own tokens that its tokenizer reads as others: 0 of the embedded default, 0.02
            of SmolLM2-135M at temperature 1 and 0.06 at 1.4; 0.27 where a third of the merges is left (measured).
        empty_prompts: share of prompts without a text; chosen.
        opposed: correlation of score and yardstick over completions below which one is the other turned round; chosen,
            as strong as `length_correlation`.
        penalty_share: share of the whole reward's variance that a penalty may make.
        half_life: tokens over which a score at the end loses half of its weight; lambda 0.95 has 13.
        rounding: share of a step, by squares, that rounding takes: in float32 1e-12 (measured).
        held_out_gap: standard deviations between the scores of training and held-out prompts.
        surprise: share by which training prompts surprise the model more or less than held-out ones; chosen, above what
            other phrasings make.
        held_out_z: standard errors by which training and held-out prompts differ, in that or in their scores; chosen.
        score_std: spread of scores, or their mean, beyond which values, which start at 0, take long to arrive.
        far_from_0: the same, in units of their spread, that mean has to be besides; chosen.
        base_moved: change of a frozen weight over the largest one; chosen, above what merging an adapter and taking it
            out again leaves in float32 (measured: 1e-7).
        dwarfed: width of half of the scores over their standard deviation below which few dwarf the others: 1.35 for
            normal scores; chosen.
        score_drift: factor by which that spread may grow.
        beyond_kl: times the change of the mean score that a policy at the run's KL can make; chosen, for scores whose
            tails are not normal.
        explained_variance: below it the value role explains little; a useful one reaches 0.5 and more.
        explained_nothing: below it the finding is a problem, above it a warning; a value role on its slow way to scores
            far from 0 is above it by the first time that the rule judges (measured).
        value_loss_growth: times its start.
        value_error: times the error of a constant, the mean score.
        value_far_off: times the distance of the first scores from 0 that values start from them; up to 2.4 in healthy
            runs, with whitened rewards (measured).
        truncated: share of completions cut at the length limit.
        length_growth: times its start.
        length_shrinkage: share of its start that the length falls to; chosen. Where the score rewards it, less than 1 /
            `length_growth` is worth a look.
        length_correlation: of score and length.
        length_is_scored: the same in the first rollouts, from which any growth is told; chosen.
        repetition: share of a completion's trigrams that occurred in it before; healthy runs here stay below 0.01
            (measured).
        distinct: different completions to different prompts.
        improbable: nats per completion, -log p, from which one answer for all prompts is none of a few labels; chosen:
            exp(5) are 148 answers.
        unlikely_twice: the same from which completions are not alike by chance, prompt for prompt; chosen.
        noticeable: standard errors from which a rise, a fall or a correlation counts.
        fighting: correlation of two reward functions below which they pull apart.
        dominates: times that one function's weighted spread exceeds every other's.
        too_clear: what a rollout's gradients, of 32 completions each, have in common, squared, over what they have not,
            in the middle of all, and in proportion of more; healthy runs stay below 0.3, those with any other mistake
            below 12 (measured).
        gradient_growth: times the median of the first `least_rows` gradient norms, or of the first half of fewer.
        prompts_at_max_length: share of prompts exactly as long as the longest.
        prompts_spread: tokens by which the shortest prompt is shorter than the longest.
        overfit_accuracy: training accuracy less held-out accuracy.
        overfit_loss: times its lowest that the held-out loss rises to.
        chance: distance of an accuracy from one half.
        chance_pairs: pairs that an accuracy is taken over, which leaves it a standard error of half of `chance`. A run
            with fewer is not judged.
        ample_rate: a learning rate at which LoRA learns what there is to learn (measured).
        uncentred: mean score in units of the range from a batch's lowest score to its highest.
        saturated_margin: margin at which sigmoid leaves no gradient (exp(-10) = 5e-5).
        length_bias: share of pairs whose longer answer wins, or a rank correlation of score and length beyond people's.
        still: DPO's margin (in units of beta times nats) up to which the policy has not moved; its accuracy is then the
            sign of rounding errors.
        displacement: nats that a chosen answer's log-probability may fall: ln 2, half its probability.
        displaced_share: share of that log-probability that it may fall, which is the larger bound for long answers.
        dpo_margin: DPO's margin (in units of beta times nats) at which its loss leaves hardly any gradient:
            sigmoid(-5) is 0.007.
        reference_gap: DPO's first rewards in float32: 0 in theory and as measured; 0.005 is above rounding errors.
        reference_gap_half: the same in half precision: rounding of 0.03 nats per token, over some hundreds of tokens.
    """

    least_rows: int = 6
    enough: int = 48
    sampling_told: float = 0.1
    sampling_gap_z: float = 6.0
    sampling_gap: float = 0.005
    negative_kl: float = 0.1
    first_approxkl: float = 1e-6
    first_approxkl_half: float = 2e-3
    first_kl: float = 0.01
    first_kl_half: float = 0.05
    no_kl: float = 1e-6
    kl_per_token: float = 0.4
    budget_per_token: float = 0.25
    budget: float = 25.0
    stays: float = 0.08
    drowned: float = 5.0
    noise_at_start: float = 5.0
    entropy: float = 0.03
    entropy_growth: float = 2.0
    entropy_gain: float = 0.5
    temperature: float = 0.5
    clipfrac: float = 0.4
    huge_approxkl: float = 1.0
    large_approxkl: float = 0.1
    small_approxkl: float = 3.5e-4
    unspent: float = 0.3
    tiny_approxkl: float = 2e-5
    repeats: int = 12
    unlike: int = 6
    within_prompt: float = 0.02
    reads_prompt: float = 0.5
    noise: float = 0.2
    noise_alone: float = 0.5
    gradient_noise: float = 5.0
    unrelated: float = 0.25
    in_part: float = 0.75
    missed: float = 0.05
    agreement_drop: float = 0.7
    agreement_gap: float = 0.3
    related: float = 0.5
    misaligned: float = 0.6
    alike: float = 0.9
    unscored: float = 0.5
    few_prompts: float = 0.6
    in_order: float = 0.6
    same_again: float = 0.01
    far_off: float = 5.0
    holds: float = 0.5
    not_read: float = 0.25
    other_tokens: float = 0.1
    empty_prompts: float = 0.05
    opposed: float = -0.5
    penalty_share: float = 0.5
    half_life: float = 5.0
    rounding: float = 0.3
    held_out_gap: float = 0.5
    surprise: float = 0.2
    held_out_z: float = 4.0
    score_std: float = 10.0
    far_from_0: float = 3.0
    dwarfed: float = 0.03
    base_moved: float = 1e-4
    score_drift: float = 5.0
    beyond_kl: float = 2.0
    explained_variance: float = 0.05
    explained_nothing: float = 0.01
    value_loss_growth: float = 10.0
    value_error: float = 4.0
    value_far_off: float = 5.0
    truncated: float = 0.5
    length_growth: float = 1.4
    length_shrinkage: float = 0.5
    length_correlation: float = 0.5
    length_is_scored: float = 0.7
    repetition: float = 0.15
    distinct: float = 0.2
    improbable: float = 5.0
    unlikely_twice: float = 3.0
    noticeable: float = 3.0
    fighting: float = -0.3
    dominates: float = 10.0
    too_clear: float = 20.0
    gradient_growth: float = 100.0
    prompts_at_max_length: float = 0.8
    prompts_spread: float = 8
    overfit_accuracy: float = 0.15
    overfit_loss: float = 1.2
    chance: float = 0.06
    chance_pairs: int = 300
    ample_rate: float = 3e-4
    uncentred: float = 0.4
    saturated_margin: float = 10.0
    length_bias: float = 0.65
    still: float = 1e-3
    displacement: float = 0.7
    displaced_share: float = 0.25
    dpo_margin: float = 5.0
    reference_gap: float = 0.005
    reference_gap_half: float = 0.1

    def budget_of(self, tokens: float) -> float:
        """The KL that a completion of so many tokens may well spend, nats."""
        return min(self.budget_per_token * max(tokens, 1.0), self.budget)
