"""Old names work, say the new one, and go."""

from importlib import import_module
from pathlib import Path

import pytest

MOVED = {
    "trl_ext.trainers.PPOTrainer": "trl_ext.PPOTrainer",
    "trl_ext.trainers.PPOConfig": "trl_ext.PPOConfig",
    "trl_ext.trainers.FeedbackRewardTrainer": "trl_ext.FeedbackRewardTrainer",
    "trl_ext.trainers.FeedbackRewardConfig": "trl_ext.FeedbackRewardConfig",
    "trl_ext.types.Judged": "trl_ext.types.ScoredRollout",
    "trl_ext.types.Shaped": "trl_ext.types.ShapedRollout",
    "trl_ext.generation.check_chat_template": "trl_ext.tokens.check_chat_template",
    "trl_ext.generation.eos_ids": "trl_ext.tokens.eos_ids",
    "trl_ext.generation.tokenize_prompts": "trl_ext.tokens.tokenize_prompts",
    "trl_ext.feedback.Judged": "trl_ext.feedback.ScoredAnswer",
    "trl_ext.feedback.Report": "trl_ext.feedback.FeedbackReport",
    "trl_ext.rewards.trl_module.RewardModule": "trl_ext.interop.RewardModule",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_new_one_with_a_warning(old: str) -> None:
    module, _, name = old.rpartition(".")
    place, _, attribute = MOVED[old].rpartition(".")
    with pytest.warns(
        FutureWarning, match=rf"^{old} is {MOVED[old]} now; the old name goes in trl_ext 0\.3\.$"
    ) as seen:
        assert getattr(import_module(module), name) is getattr(import_module(place), attribute)
    files = [Path(warning.filename).name for warning in seen if str(warning.message).startswith(old)]
    assert files == [Path(__file__).name], "it points at the caller"
    assert module == "trl_ext.trainers" or name not in getattr(import_module(module), "__all__", [])


def test_all_of_the_old_place_at_once() -> None:
    names: dict[str, object] = {}
    with pytest.warns(FutureWarning):
        exec("from trl_ext.trainers import *", names)
    assert {"PPOConfig", "PPOTrainer", "FeedbackRewardConfig", "FeedbackRewardTrainer"} <= set(names)


def test_a_name_that_never_was_is_still_an_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'trl_ext\.types' has no attribute 'Nothing'$"):
        _ = import_module("trl_ext.types").Nothing
    with pytest.raises(ImportError):
        from trl_ext.rewards.trl_module import Scorer as _  # noqa: F401
