"""A Python reward function in the shape of the reward model that TRL 1.12's PPOTrainer asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl_ext.rewards import Scorer
from trl_ext.types import Rollout


class _PromptWidth:
    """Stands in for a policy's `generate` and notes the width of the prompts that each call gets."""

    def __init__(self, policy: Any) -> None:
        self.width, self._generate = 0, policy.generate
        policy.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.width = ids.shape[1]
        return self._generate(*args, **kwargs)


class _Backbone(nn.Module):
    """Decodes ids, calls the reward function, and returns its score at every position."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, prompt: _PromptWidth) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._prompt = scorer, tokenizer, prompt

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        start = self._prompt.width
        ids, mask = input_ids.cpu(), attention_mask.bool().cpu()
        rollout = Rollout(
            prompts=self._texts(ids[:, :start], mask[:, :start]),
            completions=self._texts(ids[:, start:], mask[:, start:]),
            prompt_ids=ids[:, :start],
            prompt_mask=mask[:, :start],
            completion_ids=ids[:, start:],
            completion_mask=mask[:, start:],
            has_eos=(ids[:, start:] == self._tokenizer.eos_token_id).any(dim=1),
        )
        scores = self._scorer(rollout, {})[:, 0].nan_to_num(0.0)
        hidden = scores.view(-1, 1, 1).expand(-1, input_ids.shape[1], 1).to(input_ids.device)
        return SimpleNamespace(hidden_states=(hidden,))

    def _texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        return list(self._tokenizer.batch_decode(rows, skip_special_tokens=True))


class RewardModule(nn.Module):
    """A reward function as TRL 1.12's `PPOTrainer(reward_model=...)`.

    That trainer gives its reward model ids and nothing else. So the function gets texts without further columns, and
    None counts as a score of 0. The prompts' width is taken from the policy's last call of `generate`: the ids do not
    show where the prompt ends.

    Args:
        function: as TRL's GRPOTrainer calls it.
        tokenizer: of the policy.
        policy: the trainer's `model`.
    """

    base_model_prefix = "backbone"

    def __init__(self, function: Any, tokenizer: PreTrainedTokenizerBase, policy: Any) -> None:
        super().__init__()
        self.backbone = _Backbone(Scorer([function]), tokenizer, _PromptWidth(policy))
        self.score = nn.Identity()
