"""Which problem follows from which: causes and consequences, each edge with its mechanism and its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trl_ext.diagnostics.finding import SEVERITIES, Finding, worst

PPO_PAPER = "Schulman et al. 2017, arXiv:1707.06347, section 3"
GAE = "Schulman et al. 2016, arXiv:1506.02438, section 3"
ZIEGLER = "Ziegler et al. 2019, arXiv:1909.08593"
N_PLUS = "Huang et al. 2024, arXiv:2403.17031"
GAO = "Gao, Schulman and Hilton 2023, arXiv:2210.10760"
HACKING = "Skalse et al. 2022, arXiv:2209.13085"
ADAM = "Kingma and Ba 2015, arXiv:1412.6980, section 2"
WILLIAMS = "Williams 1992, Machine Learning 8"
MCCANDLISH = "McCandlish et al. 2018, arXiv:1812.06162, section 2"
BFLOAT = "Kalamkar et al. 2019, arXiv:1905.12322"
DISPLACEMENT = "Razin et al. 2024, arXiv:2410.08847"


def _always(cause: Finding, consequence: Finding) -> bool:
    return True


def _from_the_start(cause: Finding, consequence: Finding) -> bool:
    return cause.from_the_start


def _by_much(cause: Finding, consequence: Finding) -> bool:
    return cause.figures["moved"] > 1e-3


def _is_a_problem(cause: Finding, consequence: Finding) -> bool:
    return cause.severity == "problem"


def _over_all(cause: Finding, consequence: Finding) -> bool:
    return "correlation" in cause.figures


def _at_a_usual_rate(cause: Finding, consequence: Finding) -> bool:
    return consequence.figures["learning_rate"] >= 1e-4


def _in_scores(cause: Finding, consequence: Finding) -> bool:
    """A gap that may come with learning; how prompts are read was so before."""
    return "gap" in consequence.figures


def _score_is_right(cause: Finding, consequence: Finding) -> bool:
    """Scores that are one where a yardstick finds the completions to be of one worth, too."""
    return bool(consequence.suspects)


def _of_value(cause: Finding, consequence: Finding) -> bool:
    return "value" in cause.title


def _of_policy(cause: Finding, consequence: Finding) -> bool:
    return "policy" in cause.title


@dataclass(frozen=True)
class Edge:
    """Where both are found, the second is explained by the first.

    Attributes:
        cause, consequence: names of findings.
        mechanism: how the one makes the other, a sentence.
        source: where that is written.
        holds: a condition on the two findings.
    """

    cause: str
    consequence: str
    mechanism: str
    source: str
    holds: Callable[[Finding, Finding], bool] = _always


def _edges(
    cause: str, source: str, holds: Callable[[Finding, Finding], bool] = _always, **mechanisms: str
) -> list[Edge]:
    return [Edge(cause, name, mechanism, source, holds) for name, mechanism in mechanisms.items()]


OF_ONE_WORTH = "What is written is of one worth, and so is its score."

# Of several causes of a finding the first one here counts: what lies nearer to the settings comes first.
EDGES: tuple[Edge, ...] = (
    *_edges(
        "base_moves",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1 (the base stays as it is)",
        _by_much,
        negative_kl="The reference is another model than the one that sampled.",
        sampling_differs="What sampled is not what scores: the adapter counts twice in one of them.",
        first_ratio="Weights that change between scoring and training make other probabilities.",
        reference_moves="The reference stands on the same base.",
        score_drifts="A reward role on the same base scores otherwise than before.",
        score_unrelated="A reward role on another base than its own scores by chance.",
        score_ignores_prompt="A reward role on another base than its own reads nothing.",
        over_optimisation="The policy moves with the base, whatever the score says of it.",
        value_not_learning="The value role's base is another one each time.",
        value_loss_explodes="The value role's base is another one each time.",
        entropy_rises="Weights that nobody trains leave language.",
        entropy_collapse="Weights that nobody trains leave language.",
        mode_collapse="Weights that nobody trains leave language.",
        repetition_exploitation="Weights that nobody trains leave language.",
        truncation="Weights that nobody trains leave language.",
        kl_runs_away="The policy moves with the base, and the reference does not by as much.",
        clipping_saturated="Ratios are of two different bases.",
        noise_drowns_signal="Gradients are of another model than the one that sampled.",
        no_progress="What is learned on one base is not on the next one.",
    ),
    *_edges(
        "gradients_not_finite",
        ADAM,
        gradients_explode="Weights that blow up give large gradients before they give none.",
        clipping_saturated="After a step that ruins the weights every ratio lies outside the clip range.",
        steps_too_small="Steps on gradients that are not finite are skipped, so the policy stays.",
        truncation="A policy with ruined weights writes noise, in which EOS is as rare as any token.",
        kl_runs_away="A policy with ruined weights is far from the reference.",
        entropy_collapse="Ruined weights may give one token all probability.",
        mode_collapse="Ruined weights write the same whatever the prompt is.",
        value_loss_explodes="The value role's weights are ruined too.",
        value_not_learning="Steps on gradients that are not finite are skipped, for the value role too.",
        chance_level="A model with ruined weights orders nothing.",
        entropy_rises="Ruined weights may make every token as likely as any other.",
        no_progress="Steps on gradients that are not finite are skipped, so nothing is learned.",
    ),
    *_edges(
        "lost_to_rounding",
        BFLOAT,
        steps_too_small="What rounds to nothing moves no weight.",
        value_not_learning="The value role's adapter is rounded as the policy's is.",
        chance_level="What rounds to nothing moves no weight.",
        no_progress="What rounds to nothing moves no weight.",
    ),
    *_edges(
        "score_not_repeatable",
        GAE,
        value_not_learning="No value role can predict what is noise: it explains at most the share that repeats.",
        steps_too_small="Advantages that are noise point nowhere, so steps cancel and the score does not rise.",
        functions_at_odds="A noisy function has the largest spread, and correlates with nothing.",
        score_ignores_prompt="What the place in a batch decides does not change with the prompt.",
        score_unrelated="Noise has nothing to do with anything.",
        noise_drowns_signal="A score that is noise makes gradients that are.",
        entropy_rises="Steps on noise alone wander off, away from what the policy knew.",
        no_progress="Advantages that are noise point nowhere.",
    ),
    *_edges(
        "score_ignores_completion",
        WILLIAMS,
        steps_too_small="Where the score is the same for every completion the policy's gradient is 0 but for noise.",
        score_unrelated="A score that is not of the completion says nothing of it.",
        kl_drowns_score="A score that no completion changes pulls nowhere, and any penalty is stronger.",
        entropy_collapse="Steps on noise alone make likely what happened to be sampled.",
        kl_runs_away="Steps on noise alone drift away from the reference.",
        noise_drowns_signal="Where no completion is better than another, gradients have nothing in common.",
        entropy_rises="Steps on noise alone wander off, away from what the policy knew.",
        no_progress="No completion scores more than another, whatever is written.",
    ),
    *_edges(
        "score_ignores_prompt",
        HACKING,
        mode_collapse="One completion is as good for every prompt.",
        entropy_collapse="One completion is as good for every prompt.",
        constant_scores="One completion for every prompt has one score.",
    ),
    *_edges(
        "score_opposed",
        HACKING,
        completions_shrink="The fewer words, the fewer good ones, where these are what costs.",
        truncation="Who is punished for a good end does not end.",
        over_optimisation="What raises the score lowers what it was to stand for.",
        kl_runs_away="The reference gives good answers, and those are what the score punishes.",
    ),
    *_edges(
        "score_misaligned",
        WILLIAMS,
        score_unrelated="A score for another row says nothing of this one.",
        score_ignores_prompt="What is scored is what stands some rows away, whatever was asked here.",
        score_ignores_completion="What is scored is what stands some rows away, whatever was written here.",
        score_not_repeatable="Beside other rows a completion gets another score.",
        noise_drowns_signal="What another row earned is chance for this one.",
        steps_too_small="What another row earned is chance for this one, so steps cancel.",
        value_not_learning="What another row earned cannot be predicted.",
        over_optimisation="What another row earned is followed all the same.",
        entropy_rises="Steps on noise alone wander off, away from what the policy knew.",
        no_progress="What another row earned is chance for this one.",
    ),
    *_edges(
        "score_unrelated",
        HACKING,
        _over_all,
        score_ignores_prompt="What it stands for depends on what was asked, and what is scored does not.",
        over_optimisation="What raises the score has nothing to do with what it was to stand for.",
        constant_scores="What something else is given for may be had by all.",
    ),
    *_edges(
        "score_unrelated",
        HACKING,
        _is_a_problem,  # a score that follows what it stands for in part can be learned from
        scores_alike="What something else is given for may be had by nearly all, or by hardly any.",
        kl_runs_away="A score for something else pays for going elsewhere.",
        mode_collapse="Something else may be had by one completion for all prompts.",
        entropy_collapse="Something else may be had by one completion.",
        no_progress="A score for what the policy cannot change does not rise.",
        noise_drowns_signal="A score for what the policy cannot change gives gradients with nothing in common.",
        value_not_learning="A score for what the role cannot see cannot be predicted.",
        steps_too_small="A score for what the policy cannot change makes steps that cancel.",
    ),
    *_edges(
        "constant_scores",
        GAE,
        value_loss_explodes="Values that were taught one score meet others all at once.",
        value_not_learning="Returns that do not differ teach values nothing.",
    ),
    *_edges(
        "scores_alike",
        WILLIAMS,
        no_progress="Completions with one score have no differences to learn from.",
        noise_drowns_signal="The few that differ decide where a step goes.",
        steps_too_small="Completions with one score make no gradient.",
        value_not_learning="Returns that hardly ever differ are not predicted.",
        kl_drowns_score="A score that hardly ever differs has no spread to set against the KL.",
    ),
    *_edges(
        "mostly_unscored",
        WILLIAMS,
        no_progress="What has no score is not learned from.",
        noise_drowns_signal="So few completions decide where a step goes.",
        value_not_learning="Values see the returns of few completions.",
        held_out_differs="Which prompts get scores is not chance.",
        over_optimisation="What is not scored is not held to anything.",
        constant_scores="Those that get a score get the same.",
        scores_alike="Those that get a score get nearly the same.",
    ),
    *_edges(
        "prompts_unlike_the_model",
        ZIEGLER,
        truncation="Who was not taught to answer such prompts was not taught where to end.",
        score_unrelated="A score says little of answers that are none.",
        entropy_collapse="What cannot be answered may have one answer, next to nothing, with certainty.",
        mode_collapse="What cannot be answered may have one answer, next to nothing.",
        score_ignores_prompt="What a reward model cannot read does not change its score.",
        base_damaged="A model that cannot read what it is asked may answer with noise.",
        held_out_differs="Held-out prompts may be written as the model was taught to read them.",
        no_progress="The answers that are scored are far from those the model knows.",
        value_not_learning="What is read as noise predicts nothing.",
    ),
    *_edges(
        "few_prompts",
        "Cobbe et al. 2019, arXiv:1812.02341",
        _in_scores,
        held_out_differs="Prompts that come again and again are learned by heart.",
    ),
    *_edges(
        "few_prompts",
        "Cobbe et al. 2019, arXiv:1812.02341",
        over_optimisation="What is good for few prompts need not be for others.",
        mode_collapse="Few prompts need few completions.",
        entropy_collapse="Few prompts need few completions.",
        scores_alike="Answers to the same question are right or wrong alike.",
    ),
    *_edges(
        "prompts_in_order",
        "Bengio et al. 2009, doi:10.1145/1553374.1553380",
        score_drifts="Prompts of another kind get other scores.",
        held_out_differs="What came last was learned last, and held-out prompts are of all kinds.",
        noise_drowns_signal="What one rollout teaches the next one does not.",
        value_not_learning="The values of one kind of prompt say little of the next.",
        no_progress="What one rollout teaches the next one unteaches.",
    ),
    *_edges(
        "prompts_truncated",
        WILLIAMS,
        few_prompts="Prompts that are cut to one beginning are one prompt.",
        score_unrelated="What the model was not asked it cannot answer, well or badly.",
        score_ignores_prompt="What was cut away changes no score.",
        no_progress="What the model was not asked it cannot learn to answer.",
    ),
    *_edges(
        "empty_prompts",
        WILLIAMS,
        held_out_differs="Held-out prompts that are not empty are of another kind.",
        noise_drowns_signal="What is asked by nobody cannot be answered well.",
        value_not_learning="What is asked by nobody cannot be answered well, and the returns are chance.",
    ),
    *_edges(
        "prompts_hold_completions",
        WILLIAMS,
        held_out_differs="Held-out prompts do not hold the answer.",
        over_optimisation="To copy is what is learned.",
        entropy_collapse="What is copied is certain.",
    ),
    *_edges(
        "copied_completions",
        WILLIAMS,
        sampling_differs="A copy is as improbable for its prompt as it was drawn for another one.",
        negative_kl="Completions that the policy did not draw make the estimate of the KL wrong.",
        score_ignores_completion="Copies have one score.",
        noise_drowns_signal="Copies have no differences to learn from.",
        steps_too_small="Where all completions of a prompt are one, none is better than another.",
        no_progress="Copies have no differences to learn from.",
    ),
    *_edges(
        "base_damaged",
        WILLIAMS,
        truncation="In noise EOS is as rare as any token.",
        score_unrelated="A score says little of noise.",
        score_ignores_prompt="Noise answers no prompt.",
        scores_alike="Noise earns nothing.",
        prompts_hold_completions="In noise anything may stand.",
        noise_drowns_signal="Which noise scores better is chance.",
        value_not_learning="The returns of noise cannot be predicted.",
        held_out_differs="Noise scores by chance.",
        no_progress="Noise earns nothing that could be learned from.",
    ),
    *_edges(
        "gradients_pile_up",
        ADAM,
        clipping_saturated="Steps go on in directions of long ago, whatever they have come to.",
        gradients_explode="The sum of all gradients grows.",
        value_loss_explodes="Steps that do not end lead to where values know nothing.",
        kl_runs_away="Steps go on in directions of long ago, whatever the KL has become.",
        completions_shrink="Steps go on until nothing is left.",
        mode_collapse="Steps that do not end lead to one completion for every prompt.",
        repetition_exploitation="Steps that do not end lead to text that repeats.",
        entropy_rises="Steps that do not end lead to noise.",
        entropy_collapse="Steps that do not end lead to certainty.",
        over_optimisation="Steps go on when the score no longer means what it did.",
        steps_too_small="Where the policy is certain, no gradient of its own is left.",
        value_not_learning="The returns of such a policy change from rollout to rollout.",
        no_progress="Steps go where the first rollouts pointed.",
    ),
    *_edges(
        "rate_off_schedule",
        ADAM,
        steps_too_small="A rate near 0 makes no steps.",
        clipping_saturated="A rate that is higher than meant, or rises again, makes large steps.",
        gradients_not_finite="A rate that is higher than meant ruins the weights.",
        gradients_explode="A rate that is higher than meant makes steps that overshoot.",
        value_loss_explodes="A rate that is higher than meant makes steps that overshoot.",
        value_starts_far_off="A rate that is higher than meant ruins the value role at once.",
        kl_runs_away="A rate that is higher than meant makes steps that overshoot.",
        mode_collapse="Steps that overshoot end in one completion for every prompt.",
        repetition_exploitation="Steps that overshoot end in text that repeats.",
        entropy_rises="Steps that overshoot end in noise.",
        value_not_learning="The value role takes steps at the same rate.",
        no_progress="A rate near 0 makes no steps.",
    ),
    *_edges(
        "entropy_rises",
        WILLIAMS,
        truncation="In noise EOS is as rare as any token.",
        kl_runs_away="Noise is far from the reference.",
        value_loss_explodes="The penalty for noise is far from what values know.",
        value_not_learning="The returns of noise cannot be predicted.",
        no_progress="A policy that becomes noise earns no more by chance than before.",
    ),
    *_edges(
        "noise_drowns_signal",
        MCCANDLISH,
        value_not_learning="Returns that vary by chance are predicted by no value role.",
        no_progress="Steps go where chance points.",
    ),
    *_edges(
        "noise_drowns_signal",
        MCCANDLISH,
        _at_a_usual_rate,
        steps_too_small="Steps that go where chance points undo each other.",
    ),
    *_edges(
        "first_kl",
        ZIEGLER,
        kl_drowns_score="The penalty first pulls the policy back to another model, whatever the score says.",
        score_unrelated="What another adapter writes may be no answer, and a score says little of it.",
        score_ignores_prompt="What another adapter writes may be no answer, whatever was asked.",
        truncation="What another adapter writes may not end.",
        no_progress="The penalty first pulls the policy back to another model.",
    ),
    *_edges(
        "policy_is_reset",
        PPO_PAPER,
        noise_drowns_signal="No step is followed by a second one.",
        value_not_learning="What the values learn of one rollout may be lost with it.",
        no_progress="What an update has learned is gone in the next rollout.",
    ),
    *_edges(
        "reference_moves",
        ZIEGLER,
        score_drifts="The policy moves away, and a KL that is always 0 does not show it.",
        over_optimisation="Nothing holds the policy where the reward model knows what it scores.",
        entropy_collapse="Without a penalty the best is one completion, with certainty.",
        mode_collapse="Nothing holds completions apart.",
        repetition_exploitation="Nothing holds the policy to the reference's language.",
        length_exploitation="Nothing holds the policy to the reference's lengths.",
        completions_shrink="Nothing holds the policy to the reference's lengths.",
    ),
    *_edges(
        "sampling_differs",
        f"{N_PLUS}, on the log-probabilities that PPO compares",
        gradients_absent="Importance weights that cut every token leave nothing to learn from.",
        negative_kl="Tokens that the policy would not sample make the estimate of the KL wrong.",
        first_ratio="The sampling policy is another one than the scored one.",
        truncation="An EOS that generation forbids or delays is not written.",
        repetition_exploitation="Tokens that are forced after the end of an answer repeat it.",
        no_progress="Steps on tokens that another distribution drew do not climb the policy's own score.",
        score_unrelated="A score says little of text that no policy would write by itself.",
    ),
    *_edges(
        "first_ratio",
        PPO_PAPER,
        clipping_saturated="A ratio that is off before the first step is clipped though nothing has moved.",
        negative_kl="Log-probabilities that differ from forward to forward bias the KL.",
    ),
    *_edges(
        "functions_at_odds",
        HACKING,
        score_scale="The function that drowns the others gives the sum its scale.",
        length_exploitation="The function that drowns the others counts what is written.",
        repetition_exploitation="The function that drowns the others counts what can be repeated.",
        truncation="The function that drowns the others counts what is written.",
        over_optimisation="Only the function that drowns the others is followed.",
        kl_runs_away="The penalty suits the scale of the functions that are drowned.",
        value_not_learning="The sum has the scale of the function that drowns the others, far from where values start.",
        completions_shrink="The function that drowns the others takes something off for what is written.",
        no_progress="Where one function gains what another loses the sum stays.",
        score_unrelated="The sum is what the function that drowns the others makes of it.",
        score_ignores_prompt="The function that drowns the others need not read the prompt.",
    ),
    *_edges(
        "penalty_dominates",
        f"{N_PLUS}, the EOS trick",
        value_not_learning="Returns are 0 or the penalty, far apart, and values move by cliprange_value an update.",
        score_scale="The penalty, not the score, makes the spread.",
        kl_runs_away="The penalty pays for any KL.",
        over_optimisation="Completions are written to end, not to be good.",
        completions_shrink="To end is worth more than to say something.",
        no_progress="What is learned is to end, not to score.",
    ),
    *_edges(
        "score_scale",
        f"{N_PLUS}, detail 6; {ZIEGLER}, section 2.1",
        gradients_explode="The value role's gradient grows with its error, which has the scale of the scores.",
        value_loss_explodes="A squared error grows with the square of the scale.",
        value_not_learning="Values start at 0 and move by at most cliprange_value an update.",
        kl_runs_away="A penalty chosen for scores of a few units does not count beside these.",
        clipping_saturated="Advantages of another scale make other steps where they are not whitened.",
        completions_shrink="Until values have come to the scores an early end is a surprise, for better or worse.",
        mode_collapse="Until values have come to the scores steps follow the error of the values.",
        over_optimisation="Until values have come to the scores steps follow the error of the values.",
        no_progress="Values and clip ranges are made for scores of a few units.",
    ),
    *_edges(
        "held_out_differs",
        "Cobbe et al. 2019, arXiv:1812.02341",
        over_optimisation="What is learned for one kind of prompts need not serve another.",
        no_progress="To prompts of a kind that the model does not know it has no good answers to find.",
    ),
    *_edges(
        "score_drifts",
        GAE,
        value_loss_explodes="Values run after scores that change by themselves.",
        value_not_learning="Values run after scores that change by themselves.",
        gradients_explode="The value role's gradient grows with its error.",
        kl_drowns_score="The penalty suits the scale that scores had before.",
        kl_runs_away="The penalty suits the scale that scores had before.",
        steps_too_small="Scores that shrink leave the penalty alone to be followed.",
        no_progress="What changes by itself does not tell good completions from bad ones.",
    ),
    *_edges(
        "value_starts_far_off",
        GAE,
        value_loss_explodes="Values that far off have errors as large.",
        value_not_learning="Values move by cliprange_value an update, and have far to go.",
        gradients_explode="The value role's gradient grows with its error.",
        kl_runs_away="Until values have come to the returns, steps follow the error of the values.",
        completions_shrink="Until values have come to the returns, an early end is a surprise, for better or worse.",
        mode_collapse="Until values have come to the returns, steps follow the error of the values.",
        truncation="Until values have come to the returns, an early end is a surprise, for better or worse.",
        over_optimisation="Until values have come to the returns, steps follow the error of the values.",
        no_progress="Until values have come to the returns, steps follow the error of the values.",
    ),
    *_edges(
        "gradients_absent",
        WILLIAMS,
        _of_value,
        value_not_learning="Without a gradient nothing is learned.",
    ),
    *_edges(
        "gradients_absent",
        WILLIAMS,
        _of_policy,
        steps_too_small="Without a gradient there is no step.",
        no_progress="Without a gradient nothing is learned.",
    ),
    *_edges(
        "term_drowns_score",
        "Yu et al. 2020, arXiv:2001.06782, section 2",
        gradients_pile_up="A term that is the same whatever was written pulls one way in every minibatch.",
        kl_runs_away="The larger gradient moves the policy where it likes, away from the reference.",
        truncation="An entropy bonus that outweighs the score makes every token likely, and EOS rare.",
        steps_too_small="Clipped to one norm with the larger gradient, the score's step is small.",
        over_optimisation="The policy follows the other term.",
        entropy_rises="The bonus moves the policy wherever its entropy is higher.",
        no_progress="The larger gradient goes where it likes, whatever the score says.",
    ),
    *_edges(
        "gradients_explode",
        ADAM,
        value_loss_explodes="Steps along such gradients overshoot.",
        value_not_learning="Steps along such gradients overshoot.",
        clipping_saturated="Steps along such gradients leave the clip range at once.",
        no_progress="Steps along such gradients overshoot.",
    ),
    *_edges(
        "clipping_saturated",
        PPO_PAPER,
        kl_runs_away="Beyond the clip range nothing holds a step back.",
        entropy_collapse="Large steps make certain what happened to be sampled first.",
        mode_collapse="Large steps overshoot to one completion for every prompt.",
        value_loss_explodes="The value role takes steps as large.",
        value_not_learning="Returns change faster than values can follow.",
        over_optimisation="Large steps reach completions that the reward model has never seen.",
        no_progress="Steps that overshoot lose what they gain, and tokens that are clipped learn nothing.",
    ),
    *_edges(
        "entropy_collapse",
        WILLIAMS,
        steps_too_small="The gradient of a certain policy is 0.",
        constant_scores="One completion has one score.",
        no_progress="Where all completions are the same none is better.",
    ),
    *_edges(
        "kl_drowns_score",
        f"{ZIEGLER}, section 2.1",
        steps_too_small="Each step is pulled back to the reference, where the penalty is 0.",
        no_progress="Each step is pulled back to the reference, where the penalty is 0.",
    ),
    *_edges(
        "credit_fades",
        GAE,
        steps_too_small="Tokens that get no credit get no gradient.",
        value_not_learning="Discounted returns of early tokens hardly vary.",
        no_progress="Tokens that get no credit learn nothing.",
    ),
    *_edges(
        "steps_too_small",
        "Hu et al. 2021, arXiv:2106.09685, appendix D (rates for LoRA)",
        value_not_learning="The value role takes steps as small.",
        no_progress="Who does not move gains nothing.",
    ),
    *_edges(
        "length_exploitation",
        "Singhal et al. 2023, arXiv:2310.03716",
        score_unrelated="What is scored is length.",
        score_ignores_prompt="Length is counted without a look at the prompt.",
        truncation="Completions grow to the limit.",
        over_optimisation="What grows is length, not what the score stands for.",
        kl_runs_away="Each further token adds to a completion's KL.",
    ),
    *_edges(
        "completions_shrink",
        HACKING,
        score_unrelated="What is scored is brevity.",
        score_ignores_prompt="Length is counted without a look at the prompt.",
        over_optimisation="What shrinks is what the score was to stand for.",
        kl_runs_away="An early EOS is unlikely under the reference.",
        mode_collapse="Completions of next to nothing are alike.",
        constant_scores="Completions of next to nothing have one score.",
        no_progress="Who says nothing scores nothing.",
    ),
    *_edges(
        "repetition_exploitation",
        HACKING,
        score_unrelated="What is scored can be repeated.",
        score_ignores_prompt="What can be repeated is counted without a look at the prompt.",
        truncation="Who repeats does not end.",
        over_optimisation="What is repeated raises the score, not what it stands for.",
        kl_runs_away="Repetition is unlikely under the reference.",
        entropy_collapse="What is repeated is certain.",
    ),
    *_edges(
        "truncation",
        f"{N_PLUS}, the EOS trick",
        _from_the_start,
        score_unrelated="What is cut off before it has been said is not scored for what it says.",
        mode_collapse="Of a few tokens there are few completions.",
        completions_shrink="Who is cut off learns to say less.",
        over_optimisation="Who is cut off learns to say less, whatever it was to say.",
        kl_runs_away="To be short is worth more than to stay near the reference.",
    ),
    *_edges(
        "truncation",
        f"{N_PLUS}, the EOS trick",
        penalty_dominates="Where many completions are cut, the penalty varies more than the score.",
        no_progress="What is cut off has not said what it would be scored for.",
    ),
    *_edges(
        "value_loss_explodes",
        GAE,
        value_not_learning="Values that far off explain nothing.",
        no_progress="Advantages over such values are noise.",
    ),
    *_edges(
        "kl_runs_away",
        GAO,
        over_optimisation="The further from the reference, the less a reward model knows of what it scores.",
        entropy_collapse="Without a penalty the best is one completion, with certainty.",
    ),
    *_edges(
        "score_ignores_prompt",
        HACKING,
        over_optimisation="What raises such a score need not answer what was asked.",
    ),
    *_edges(
        "mode_collapse",
        WILLIAMS,
        no_progress="One completion for all prompts is right for few.",
    ),
    # What leaves nothing to tell completions apart by.
    *_edges("base_damaged", WILLIAMS, _score_is_right, constant_scores=OF_ONE_WORTH),
    *_edges("entropy_collapse", WILLIAMS, _score_is_right, scores_alike=OF_ONE_WORTH),
    *(
        edge
        for cause, source in (
            ("prompts_unlike_the_model", ZIEGLER),
            ("first_kl", ZIEGLER),
            ("entropy_rises", WILLIAMS),
            ("mode_collapse", WILLIAMS),
            ("repetition_exploitation", HACKING),
            ("truncation", f"{N_PLUS}, the EOS trick"),
        )
        for edge in _edges(cause, source, _score_is_right, constant_scores=OF_ONE_WORTH, scores_alike=OF_ONE_WORTH)
    ),
    *_edges(
        "margins_explode",
        DISPLACEMENT,
        likelihood_displacement="Margins beyond what the pairs ask for are made by pushing both answers down.",
    ),
)

# What makes a difference before anything is learned. No other cause explains what is there in the first rollout.
BEFORE_A_STEP = (
    *("first_kl", "sampling_differs", "prompts_truncated", "copied_completions", "prompts_unlike_the_model"),
    "base_damaged",
)


@dataclass(frozen=True)
class Explained:
    """A finding and those that follow from it.

    Attributes:
        finding: the cause.
        because: the edge by which it follows from another one; None: it is a root.
        follows: its consequences, each with what follows from it in turn.
    """

    finding: Finding
    because: Edge | None
    follows: tuple[Explained, ...]

    def __iter__(self) -> Iterator[Explained]:
        """Itself and all that follows."""
        yield self
        for one in self.follows:
            yield from one

    @property
    def severity(self) -> str:
        """The worst of its own and of what follows."""
        return worst(one.finding for one in self)


def cause_of(finding: Finding, findings: Sequence[Finding], edges: Sequence[Edge] = EDGES) -> Edge | None:
    """The first edge by which one of `findings` explains `finding`, one of its own before those of `edges`; None where
    none does."""
    by_name = {one.name: one for one in findings}
    for one in findings:
        if finding.name in one.explains:
            return Edge(one.name, finding.name, *one.explains[finding.name])
    for edge in edges:
        if finding.from_the_start and edge.cause not in BEFORE_A_STEP:
            continue
        if edge.consequence == finding.name and edge.cause in by_name and edge.holds(by_name[edge.cause], finding):
            return edge
    return None


def roots(findings: Sequence[Finding], edges: Sequence[Edge] = EDGES) -> list[Explained]:
    """Findings that no other one explains, in the given order but those with a problem in them first; each with what
    follows from it below it."""
    causes = {finding.name: cause_of(finding, findings, edges) for finding in findings}

    def explained(finding: Finding) -> Explained:
        below = [one for one in findings if (edge := causes[one.name]) is not None and edge.cause == finding.name]
        return Explained(finding, causes[finding.name], tuple(explained(one) for one in below))

    tops = [explained(finding) for finding in findings if causes[finding.name] is None]
    return sorted(tops, key=lambda top: SEVERITIES.index(top.severity))
