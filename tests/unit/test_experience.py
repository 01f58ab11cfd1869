"""From scores to advantages, and the rollout's metrics: against loops in plain Python and by hand."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import QUIET, rollout
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.experience import make_experience
from trl_ext.ppo.summary import explained_variance, repetition, sampling_gap, summarize, weighted_gap
from trl_ext.types import Rollout, ScoredRollout, ScorePass, Scores

NAN, INF = float("nan"), float("inf")
LENGTHS, ENDED = [4, 1, 3, 2, 4], [False, True, True, True, False]
TOTALS = [1.5, -0.5, NAN, 2.0, 0.25]  # the third answer has no score
SCORED = [0, 1, 3, 4]

Row = list[float]


def config(folder: Path, **changes: Any) -> PPOConfig:
    return PPOConfig(str(folder), **{**QUIET, **changes})


def pass_over(answers: Rollout, seed: int = 0) -> ScorePass:
    """Random log-probs, entropies and values in float64, 0 on padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = answers.completion_ids.shape
    drawn = [torch.rand(shape, generator=generator, dtype=torch.float64) * answers.completion_mask for _ in range(4)]
    return ScorePass(
        -2 * drawn[0], 3 * drawn[1], -2 * drawn[2], drawn[3] - 0.5 * answers.completion_mask, torch.full((5,), NAN)
    )


@pytest.fixture
def judged() -> ScoredRollout:
    answers = rollout(LENGTHS, ENDED)
    total = torch.tensor(TOTALS, dtype=torch.float64)
    return ScoredRollout(answers, Scores(total, total.unsqueeze(1)), pass_over(answers))


def whitened(rows: dict[int, Row], keep_mean: bool) -> dict[int, Row]:
    numbers = [x for row in rows.values() for x in row]
    mean, scale = statistics.fmean(numbers), math.sqrt(statistics.variance(numbers) + 1e-8)
    return {i: [(x - mean) / scale + (mean if keep_mean else 0.0) for x in row] for i, row in rows.items()}


def by_loop(pass_: ScorePass, args: PPOConfig) -> dict[str, dict[int, Row]]:
    """KL, rewards, advantages and returns of the scored rows, token by token."""
    kl: dict[int, Row] = {}
    rewards: dict[int, Row] = {}
    for i in SCORED:
        pairs = list(zip(pass_.logprobs[i].tolist(), pass_.ref_logprobs[i].tolist(), strict=True))[: LENGTHS[i]]
        estimators = {
            "k1": lambda p, q: p - q,
            "k2": lambda p, q: (p - q) ** 2 / 2,
            "k3": lambda p, q: math.exp(q - p) - 1 + (p - q),
        }
        kl[i] = [estimators[args.kl_estimator](p, q) for p, q in pairs]
        rewards[i] = [-args.kl_coef * k for k in kl[i]]
        rewards[i][-1] += TOTALS[i] - (0.0 if ENDED[i] else args.missing_eos_penalty or 0.0)
    if args.whiten_rewards:
        rewards = whitened(rewards, keep_mean=True)
    advantages: dict[int, Row] = {}
    returns: dict[int, Row] = {}
    for i in SCORED:
        n = LENGTHS[i]
        v = [*pass_.values[i, :n].tolist(), 0.0]
        deltas = [rewards[i][t] + args.gamma * v[t + 1] - v[t] for t in range(n)]

        def ahead(numbers: Row, decay: float) -> Row:
            return [sum(decay ** (s - t) * numbers[s] for s in range(t, len(numbers))) for t in range(len(numbers))]

        if args.objective == "reinforce":
            returns[i] = ahead(rewards[i], args.gamma)
            advantages[i] = [a - b for a, b in zip(returns[i], v, strict=False)]
            continue
        advantages[i] = ahead(deltas, args.gamma * args.lam)
        of_values = args.lam if args.lam_value is None else args.lam_value
        returns[i] = [a + b for a, b in zip(ahead(deltas, args.gamma * of_values), v, strict=False)]
    if args.whiten_advantages:
        advantages = whitened(advantages, keep_mean=False)
    return {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"whiten_advantages": False},
        {"whiten_rewards": True},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"missing_eos_penalty": 1.25, "whiten_advantages": False},
        {"kl_estimator": "k2", "kl_coef": 0.7, "whiten_advantages": False},
        {"kl_estimator": "k3", "kl_coef": 0.7, "gamma": 0.9, "lam": 0.5},
        {"lam": 0.9, "lam_value": 1.0, "whiten_advantages": False},
        {"objective": "kl_penalty"},
        {"objective": "reinforce", "baseline": "value", "num_ppo_epochs": 1, "gamma": 0.9},
        {"objective": "reinforce", "baseline": "value", "num_ppo_epochs": 1, "whiten_advantages": False},
    ],
    ids=lambda settings: "+".join(settings) or "defaults",
)
def test_against_a_loop(settings: dict[str, Any], judged: ScoredRollout, tmp_path: Path) -> None:
    args = config(tmp_path, **settings)
    experience = make_experience(judged, args)
    for name, rows in by_loop(judged.score_pass, args).items():
        for i, row in rows.items():
            padding = [0.0] * (max(LENGTHS) - LENGTHS[i])
            assert getattr(experience, name)[i].tolist() == pytest.approx([*row, *padding], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "sequence"},
        {"objective": "reinforce", "baseline": "mean", "num_ppo_epochs": 1},
        {"objective": "reinforce", "baseline": "leave_one_out", "num_ppo_epochs": 1},
    ],
    ids=lambda settings: settings.get("baseline", "sequence"),
)
def test_without_a_critic_against_a_loop(settings: dict[str, Any], judged: ScoredRollout, tmp_path: Path) -> None:
    """An answer's return, KL included, less the mean of all or of the others, at each of its tokens."""
    args = config(tmp_path, kl_coef=0.7, whiten_advantages=False, **settings)
    experience, pass_ = make_experience(judged, args), judged.score_pass
    worth = {}
    for i in SCORED:
        gaps = (pass_.logprobs[i, : LENGTHS[i]] - pass_.ref_logprobs[i, : LENGTHS[i]]).tolist()
        worth[i] = TOTALS[i] - 0.7 * sum(gaps)
    for i in SCORED:
        others = [worth[j] for j in SCORED if j != i or settings.get("baseline") != "leave_one_out"]
        expected = worth[i] - statistics.fmean(others)
        assert experience.advantages[i].tolist() == pytest.approx(
            [expected] * LENGTHS[i] + [0.0] * (max(LENGTHS) - LENGTHS[i]), rel=1e-9, abs=1e-9
        )


def test_what_goes_in_comes_out(judged: ScoredRollout, tmp_path: Path) -> None:
    experience = make_experience(judged, config(tmp_path))
    assert experience.rollout is judged.rollout
    assert experience.scores is judged.scores
    assert experience.score_pass is judged.score_pass


def test_a_row_without_a_score_is_left_out(judged: ScoredRollout, tmp_path: Path) -> None:
    experience = make_experience(judged, config(tmp_path, whiten_rewards=True))
    assert experience.loss_mask.sum(dim=1).tolist() == [4, 1, 0, 2, 4]
    for name in ("rewards", "advantages", "returns", "kl"):
        assert bool(getattr(experience, name).isfinite().all()), name
    assert experience.advantages[2].tolist() == experience.returns[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_a_row_without_a_score_changes_nothing_for_the_others(
    whiten_rewards: bool, judged: ScoredRollout, tmp_path: Path
) -> None:
    args = config(tmp_path, whiten_rewards=whiten_rewards)
    others = torch.tensor(SCORED)
    without = make_experience(judged.rows(others), args)
    among = make_experience(judged, args).rows(others)
    for name in ("rewards", "advantages", "returns", "loss_mask"):
        torch.testing.assert_close(getattr(among, name), getattr(without, name), rtol=1e-12, atol=1e-12)


def test_no_row_has_a_score(judged: ScoredRollout, tmp_path: Path) -> None:
    nothing = Scores(torch.full((5,), NAN), torch.full((5, 1), NAN))
    args = config(tmp_path, whiten_rewards=True, missing_eos_penalty=1.0)
    experience = make_experience(replace(judged, scores=nothing), args)
    assert not experience.loss_mask.any()
    assert experience.advantages.abs().sum().item() == experience.returns.abs().sum().item() == 0.0
    metrics = summarize(experience, args, ["judge"])
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["objective/unscored"] == 5.0


# Metrics -------------------------------------------------------------------------------------------------------------


def test_what_the_doctor_reads_of_answers_and_prompts(tmp_path: Path) -> None:
    """Four answers of one to four tokens, two of them to the same prompt, three of them the same."""
    answers = replace(
        rollout([1, 2, 3, 4], [True] * 4, [1, 3, 3, 2]), prompts=["a", "a", "b", "c"], completions=["x", "x", "x", "y"]
    )
    total, nothing = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.zeros(4, 4)
    pass_ = ScorePass(nothing, nothing, nothing, nothing, torch.full((4,), NAN))
    args = config(tmp_path)
    metrics = summarize(
        make_experience(ScoredRollout(answers, Scores(total, total.unsqueeze(1)), pass_), args), args, ["f"]
    )
    expected = statistics.correlation([1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0])
    assert metrics["completions/score_length_correlation"] == pytest.approx(expected, rel=1e-6)
    shares = ("completions/distinct", "prompts/distinct", "prompts/at_max_length")
    assert [metrics[name] for name in shares] == [0.5, 0.75, 0.5]


def test_prompts_that_are_empty_or_hold_the_completion(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Is it Paris?"}, {"role": "user", "content": "Well?"}]
    answers = replace(
        rollout([1] * 4, [True] * 4),
        prompts=["", "Well.\n", "Say Paris.", asked],
        completions=["", ".", "Paris", " Paris "],
    )
    total, nothing = torch.tensor([1.0, 1.0, 1.0 + 1e-9, 5.0]), torch.zeros(4, 1)
    pass_ = ScorePass(nothing, nothing, nothing, nothing, torch.full((4, 1), NAN))
    args = config(tmp_path)
    experience = make_experience(ScoredRollout(answers, Scores(total, total.unsqueeze(1)), pass_), args)
    metrics = summarize(experience, args, ["f"])
    assert metrics["prompts/empty"] == 0.25
    assert metrics["prompts/hold_completion"] == 0.5, "in any message; what says nothing stands nowhere"
    assert metrics["objective/scores_alike"] == 0.75


GAPS = [1.0 - 77.0, 2.0 - 77.0, 0.5 - 77.0, 3.0 - 77.0]  # -log-prob less entropy of each token


def by_hand(folder: Path, **changes: Any) -> dict[str, float]:
    """Three answers: cut off after two tokens, ended after one, ended after one and without a score."""
    answers = rollout([2, 1, 1], [False, True, True])
    scores = Scores(torch.tensor([1.0, 3.0, NAN]), torch.tensor([[1.0, NAN], [3.0, 2.0], [NAN, NAN]]))
    pass_ = ScorePass(
        logprobs=torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, 0.0]]),
        entropy=torch.full((3, 2), 77.0),  # of the whole distribution: not what objective/entropy reports
        ref_logprobs=torch.tensor([[-1.5, -1.0], [-1.0, 0.0], [-2.0, 0.0]]),
        values=torch.tensor([[0.5, 1.0], [0.25, 0.0], [9.0, 0.0]]),
        reward_scores=torch.full((3, 1), NAN),
    )
    args = config(folder, kl_coef=0.1, **changes)
    return summarize(make_experience(ScoredRollout(answers, scores, pass_), args), args, ["first", "second"])


def test_summary_by_hand(tmp_path: Path) -> None:
    # k1 a token: 0.5, -1 | 0.5 | -1. A row: -0.5, 0.5, -1; mean -1/3.
    metrics = by_hand(tmp_path, missing_eos_penalty=0.5, gamma=1.0, lam=1.0)
    # Scores less the penalty: 0.5 and 3. Rewards: -0.05, 0.1 + 0.5 | -0.05 + 3. Returns at lambda 1: 0.55, 0.6 | 2.95.
    returns, errors = [0.55, 0.6, 2.95], [0.55 - 0.5, 0.6 - 1.0, 2.95 - 0.25]
    expected = {
        "objective/kl": -1 / 3,
        "objective/kl_std": statistics.pstdev([-0.5, 0.5, -1.0]),
        "objective/entropy": (3.0 + 0.5 + 3.0) / 3,
        "objective/non_score_reward": 0.1 / 3,
        "objective/scores": 1.75,
        "objective/scores_std": 1.25,
        "objective/rlhf_reward": 1.75 + 0.1 / 3,
        "objective/kl_coef": 0.1,
        "objective/scores_median": 1.0,  # the lower one of the two in the middle
        "objective/scores_shorth": 2.0,  # 1 to 3
        "objective/scores_alike": 0.5,
        "objective/unscored": 1,
        "val/num_eos_tokens": 2,
        "val/explained_variance": 1 - statistics.pvariance(errors) / statistics.pvariance(returns),
        "completions/mean_length": 4 / 3,
        "completions/min_length": 1,
        "completions/max_length": 2,
        "completions/clipped_ratio": 1 / 3,
        "completions/repetition": 0,  # none has three tokens
        "completions/distinct": 1,
        "completions/score_length_correlation": 0,  # of two rows
        "prompts/mean_length": 2,
        "prompts/min_length": 2,
        "prompts/max_length": 2,
        "prompts/at_max_length": 1,
        "prompts/distinct": 1,
        "prompts/empty": 0,
        "prompts/hold_completion": 0,
        "val/sampling_gap": sum(GAPS) / 4,
        "val/sampling_gap_z": sum(GAPS) / math.sqrt(sum(gap**2 for gap in GAPS)),
        "rewards/first/mean": 2,
        "rewards/first/std": 1,
        "rewards/second/mean": 2,
        "rewards/second/std": 0,
        "rewards/correlation/first~second": 0,  # one row that both scored
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in metrics.values())


def test_the_kl_that_is_reported_is_k1_and_the_one_that_is_paid_is_the_configured(tmp_path: Path) -> None:
    metrics = by_hand(tmp_path, kl_estimator="k2")
    assert metrics["objective/kl"] == pytest.approx(-1 / 3, rel=1e-5)
    # k2 a row: (0.25 + 1) / 2, 0.25 / 2, 1 / 2; mean 1.25 / 3.
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.1 * 1.25 / 3, rel=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(2.0 - 0.1 * 1.25 / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("sharper", "expected"),
    [(1.0, "same"), (2.0, "below"), (0.5, "above")],
)
def test_the_sampling_gap_tells_other_sampling_from_scoring(sharper: float, expected: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 10, 20, generator=generator, dtype=torch.float64)
    drawn = torch.distributions.Categorical(logits=sharper * logits)
    scored = torch.distributions.Categorical(logits=logits)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokens = drawn.sample()
    logprobs = scored.log_prob(tokens)
    pass_ = ScorePass(logprobs, scored.entropy(), logprobs, logprobs, logprobs[:, 0])
    z = sampling_gap(pass_, torch.ones(64, 10, dtype=torch.bool))["val/sampling_gap_z"]
    assert {"same": abs(z) < 3, "below": z < -6, "above": z > 6}[expected], z


@pytest.mark.parametrize(("sharper", "expected"), [(1.0, "0"), (1.3, "below"), (0.8, "above")])
def test_the_weighted_gap_tells_a_false_word_from_a_policy_that_has_moved(sharper: float, expected: str) -> None:
    """The tokens are drawn from another distribution (mu) than they are scored under (pi), and the generator tells mu
    as it is, or flatter, or sharper."""
    generator = torch.Generator().manual_seed(0)
    told, moved = (torch.randn(6400, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    mu, pi = told.log_softmax(-1), (1.2 * told + 0.2 * moved).log_softmax(-1)
    drawn = torch.multinomial((sharper * told).softmax(-1), 1, generator=generator)
    of_mu, of_pi = (x.gather(1, drawn).view(640, 10) for x in (mu, pi))
    pass_ = ScorePass(of_pi, -(pi.exp() * pi).sum(-1).view(640, 10), of_pi, of_pi, of_pi[:, :1])
    mask = torch.ones(640, 10, dtype=torch.bool)
    found = weighted_gap(pass_, of_mu, mask)
    terms = [
        p / m * (-math.log(p) - h)
        for p, m, h in zip(*(x.flatten().tolist() for x in (of_pi.exp(), of_mu.exp(), pass_.entropy)), strict=True)
    ]
    assert found["val/weighted_gap"] == pytest.approx(sum(terms) / 6400)
    z = found["val/weighted_gap_z"]
    assert {"0": abs(z) < 3, "below": z < -6, "above": z > 6}[expected], z
    if expected == "0":
        assert sampling_gap(pass_, mask)["val/sampling_gap_z"] > 6, "which the plain gap does not tell apart"


def test_certain_answers_are_no_sampling_gap() -> None:
    """Where the likeliest token has probability 1 - 1e-5, a rollout hardly ever shows another one."""
    logprobs = torch.full((64, 10), math.log1p(-1e-5), dtype=torch.float64)
    entropy = torch.full_like(logprobs, 1e-5 * (1 - math.log(1e-5)))
    z = sampling_gap(ScorePass(logprobs, entropy, logprobs, logprobs, logprobs[:, 0]), torch.ones(64, 10).bool())
    assert abs(z["val/sampling_gap_z"]) < 1


def test_repetition_counts_trigrams() -> None:
    answers = rollout([5, 6, 2], [True, True, True])
    ids = torch.zeros_like(answers.completion_ids)
    ids[0, :5] = torch.tensor([1, 2, 3, 4, 5])  # three trigrams, all new
    ids[1, :6] = torch.tensor([1, 2, 1, 2, 1, 2])  # 121, 212, 121, 212: half of them repeated
    assert repetition(replace(answers, completion_ids=ids)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 4.0], 1.0),  # perfect
        ([11.0, 12.0, 14.0], 1.0),  # an offset does not count
        ([5.0, 5.0, 5.0], 0.0),  # one guess for all
        ([-1.0, -2.0, -4.0], -3.0),  # the wrong way: errors twice the returns, variance four times
        ([0.5, 1.0, 2.0], 0.75),  # half of each: errors half the returns, variance a quarter
    ],
)
def test_explained_variance(values: list[float], expected: float) -> None:
    mask = torch.tensor([[True, True], [True, False]])
    returns = torch.tensor([[1.0, 2.0], [4.0, NAN]])
    padded = torch.tensor([values[:2], [values[2], INF]])
    assert explained_variance(padded, returns, mask) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_where_there_is_none_to_explain() -> None:
    values, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    assert explained_variance(values, torch.tensor([[3.0, 3.0]]), mask) == 0.0
    assert explained_variance(values, torch.tensor([[3.0, 4.0]]), torch.tensor([[True, False]])) == 0.0
    assert explained_variance(values, torch.tensor([[3.0, 4.0]]), ~mask) == 0.0
