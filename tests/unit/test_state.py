"""The rollout in use, saved and loaded: every bit as it was."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ext.ppo.checkpoints import load_experience, save_experience
from trl_ext.types import Experience, Rollout, ScorePass, Scores

NAN = float("nan")
CHAT = [[{"role": "user", "content": "Où? 北京 🙂"}], [{"role": "user", "content": 'a "quoted"\nline\t'}]]
TEXTS = ["plain", "ünïcode\u2028 \x00"]


def experience(prompts: list[Any], seed: int = 0) -> Experience:
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randn(2, 3, generator=generator)

    mask = torch.tensor([[True, True, True], [True, False, False]])
    answers = Rollout(
        prompts=prompts,
        completions=[[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": ""}]],
        prompt_ids=torch.tensor([[0, 2**40], [3, 4]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        completion_ids=torch.tensor([[5, 6, 7], [1, 0, 0]]),
        completion_mask=mask,
        has_eos=torch.tensor([False, True]),
    )
    scores = Scores(torch.tensor([NAN, 0.1]), torch.tensor([[NAN, NAN], [0.1, -0.0]]))
    pass_ = ScorePass(tokens(), tokens().bfloat16(), tokens(), tokens(), torch.tensor([NAN, 1e-45]))
    return Experience(answers, scores, pass_, tokens().T.contiguous().T, tokens(), mask.clone(), tokens(), tokens())


def assert_same(a: Any, b: Any, name: str = "") -> None:
    assert type(a) is type(b), name
    if is_dataclass(a):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{name}.{f.name}")
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert (
            a.contiguous().flatten().view(torch.uint8).tolist() == b.contiguous().flatten().view(torch.uint8).tolist()
        ), name
    else:
        assert a == b, name


@pytest.mark.parametrize("prompts", [CHAT, TEXTS], ids=["chat", "texts"])
def test_round_trip_is_exact(prompts: list[Any], tmp_path: Path) -> None:
    saved = experience(prompts)
    assert not saved.kl.is_contiguous()
    save_experience(saved, tmp_path)
    loaded = load_experience(tmp_path)
    assert loaded is not None
    assert_same(loaded, saved)


def test_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    save_experience(experience(CHAT, seed=0), tmp_path)
    save_experience(experience(TEXTS, seed=1), tmp_path)
    loaded = load_experience(tmp_path)
    assert loaded is not None
    assert_same(loaded, experience(TEXTS, seed=1))


def test_nothing_saved(tmp_path: Path) -> None:
    assert load_experience(tmp_path) is None
    assert load_experience(tmp_path / "nowhere") is None


def test_files_are_data_and_no_code(tmp_path: Path) -> None:
    """Nothing pickled: a checkpoint from elsewhere can be loaded without running what is in it."""
    save_experience(experience(TEXTS), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollout.json", "rollout.safetensors"]
