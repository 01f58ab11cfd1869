"""Several policies and reward roles over one base, and what they write: the base's weights are loaded once."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from trl_ext.generation import Answers, Generator, VLLMServers, generate
from trl_ext.generation.rollouts import check_whole
from trl_ext.generation.vllm_server import Adapter, request_of
from trl_ext.rewards import reward_role
from trl_ext.roles import SharedBase, adapters, assembly
from trl_ext.tokens import eos_ids, padded
from trl_ext.types import Rollout

BASE = "base"  # as a folder: the model without an adapter
BLOCK = 1 << 16  # bytes


@dataclass(frozen=True)
class Cast:
    """Who is put on the one base.

    Attributes:
        base: name or folder of the model.
        policies: name of each to the folder of its adapter; None is the bare base.
        rewards: folders of reward adapters.
        chat_template_kwargs: arguments of the chat template that everybody reads prompts by.
    """

    base: str
    policies: Mapping[str, Path | None]
    rewards: tuple[Path, ...] = ()
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def checked(
        cls,
        base: str,
        policies: Sequence[str] = (),
        rewards: Sequence[str | Path] = (),
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Cast:
        """Check all that the files tell without a model.

        Args:
            base: name or folder of the model.
            policies: NAME=FOLDER each, or NAME=base for the model without an adapter; none: that one.
            rewards: folders of reward adapters.
            chat_template_kwargs: arguments of the chat template.

        Raises:
            FileNotFoundError: a folder is missing or holds no adapter.
            ValueError: a name without a folder, a name twice, an adapter of another base.
        """
        if adapters.named(base).adapter is not None:
            raise ValueError(f"{base!r} is an adapter: give its base, and the adapter as --policy NAME={base}.")
        folders: dict[str, Path | None] = {}
        for policy in policies or [f"{BASE}={BASE}"]:
            name, equals, folder = policy.partition("=")
            if not (name and equals and folder):
                raise ValueError(f"The policy {policy!r} must be NAME=FOLDER, or NAME={BASE} for the bare base.")
            if name in folders:
                raise ValueError(f"Two policies are called {name!r}: give each a name of its own.")
            plan = assembly.plan(base, None if folder == BASE else folder, "head", None, None)
            folders[name] = plan.policy if isinstance(plan.policy, Path) else None
        plan = assembly.plan(base, None, "head", rewards or None, None)
        return cls(base, folders, plan.reward, chat_template_kwargs)

    def with_reward(self, folder: str | Path) -> tuple[Cast, int]:
        """The same with a further reward adapter, where it is not there yet, and the number that it has.

        Raises:
            FileNotFoundError, ValueError: as `checked`.
        """
        [added] = Cast.checked(self.base, rewards=[folder]).rewards
        known = [reward.resolve() for reward in self.rewards]
        if added.resolve() in known:
            return self, known.index(added.resolve())
        return replace(self, rewards=(*self.rewards, added)), len(known)

    @property
    def reward_names(self) -> list[str]:
        """A name for each reward adapter: the folder's; with the one above it, where it would be there twice."""
        names = [folder.name for folder in self.rewards]
        parents = [f"{f.resolve().parent.name}/{f.name}" if names.count(f.name) > 1 else f.name for f in self.rewards]
        return parents if len({*parents}) == len(parents) else [str(folder) for folder in self.rewards]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the first policy which brings one, and so ends its answers and writes its prompts by it; the base's
        where none does, or none has a chat template and the base's has one."""
        own = AutoTokenizer.from_pretrained(self.base)
        folders = [f for f in self.policies.values() if f is not None and (f / "tokenizer_config.json").is_file()]
        brought = [AutoTokenizer.from_pretrained(str(folder)) for folder in folders]
        if len({(one.eos_token_id, str(one.chat_template)) for one in brought}) > 1:
            warnings.warn(
                "The policies' tokenizers end answers or write conversations in different ways, and all of them are "
                f"asked as {str(folders[0])!r} is: evaluate them one by one.",
                UserWarning,
                stacklevel=2,
            )
        with_template = (tokenizer for tokenizer in [*brought, own] if tokenizer.chat_template is not None)
        return next(with_template, brought[0] if brought else own)

    def loaded(self, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Policies:
        """Load the base, and lay everyone on it.

        Args:
            **how: further arguments of `SharedBase.from_pretrained`: quantization_config, dtype, device_map, ...
        """
        settings = {name: how.pop(name, None) for name in ("quantization_config", "dtype", "device_map")}
        model = assembly.load_base(self.base, *settings.values(), **how)
        folders = {name: folder for name, folder in self.policies.items() if folder is not None}
        first = next(iter(folders.values()), None)
        # PEFT wants an adapter even where only the bare base speaks.
        plan = assembly.plan(self.base, first or replace(assembly.default_lora(model), r=1), "head", None, None)
        laid = assembly.assemble(model, plan)
        own: dict[str, str | None] = dict.fromkeys(self.policies)
        for i, (name, folder) in enumerate(folders.items()):
            own[name] = laid.adapters["policy"] if i == 0 else assembly.add_saved(laid.model, folder, "policy")
        lm_head = laid.model.get_base_model().get_output_embeddings()
        config = laid.model.get_base_model().config.get_text_config()
        rewards = [
            RewardAdapter(
                assembly.add_saved(laid.model, folder, "reward"),
                adapters.load_scalar_head(folder, lm_head.weight.shape[1], lm_head.weight.device),
                adapters.read_pad_token_id(folder, getattr(config, "pad_token_id", None)),
            )
            for folder in self.rewards
        ]
        named = dict(zip(self.reward_names, rewards, strict=True))
        return Policies(laid.model, tokenizer, own, named, self.chat_template_kwargs)


def fingerprint(folder: Path) -> str:
    """Changes where what makes the model or adapter in `folder` does: its configs and weights. Of a file of weights the
    size and up to 64 blocks are read, which takes no time and misses no training that moves most of the weights."""
    digest = hashlib.sha256()
    configs = [folder / name for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, adapters.CONFIG)]
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    for file in [*filter(Path.is_file, configs), *weights]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(BLOCK, size // 64)):
                stream.seek(start)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RewardAdapter:
    """A reward role: its adapter, its head (hidden size -> 1), and which id is padding to it (see `SharedBase`)."""

    adapter: str
    head: nn.Module
    pad_token_id: int | None


class Policies(SharedBase):
    """One base that speaks for several policies, each by its name, and scores by several reward roles.

    Attributes:
        tokenizer: by which all are asked; see `Cast.tokenizer`.
        policies: adapter of each policy; None is the bare base.
        rewards: reward functions, by name, that give each reward role's score.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        policies: Mapping[str, str | None],
        rewards: Mapping[str, RewardAdapter],
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, {"reference": None}, {})
        self.tokenizer, self.policies, self.chat_template_kwargs = tokenizer, dict(policies), chat_template_kwargs
        self._servers: tuple[VLLMServers, dict[str, Adapter | None]] | None = None
        self.requires_grad_(False).eval()
        self.rewards = {
            name: reward_role(_Scoring(self, reward), tokenizer, chat_template_kwargs=chat_template_kwargs)
            for name, reward in rewards.items()
        }
        for name, function in self.rewards.items():
            function.__name__ = name

    def _adapter(self, role: str) -> str | None:
        return self.policies[role.removeprefix("policy:")] if role.startswith("policy:") else super()._adapter(role)

    def sample(self, policy: str, prompts: Sequence[Any], uniforms: Tensor, temperature: float = 1.0) -> Rollout:
        """One completion for each prompt.

        Args:
            policy: by its name.
            uniforms: (prompts, most tokens) float64 in [0, 1): each row's random numbers, see `Drawn`.
            temperature: of the sampling; 0: the likeliest token.
        """
        ends, known = eos_ids(self.causal_lm, self.tokenizer), self.causal_lm.get_input_embeddings().num_embeddings
        config = GenerationConfig(
            max_new_tokens=uniforms.shape[1],
            do_sample=False,  # `Drawn` leaves one token to choose from
            pad_token_id=next(i for i in (self.tokenizer.pad_token_id, *ends) if i is not None and i < known),
            eos_token_id=ends,
            use_cache=True,
        )
        generator: Generator = _Generator(self, uniforms, temperature)
        if self._servers is not None:
            servers, adapters_of = self._servers
            generator = _Served(servers, adapters_of[policy], uniforms, temperature)
        return generate(generator, prompts, self.tokenizer, config, self.chat_template_kwargs, role=f"policy:{policy}")

    @contextmanager
    def served(self, urls: Sequence[str], folders: Mapping[str, Path | None], names: Collection[str]) -> Iterator[None]:
        """Within, vLLM servers sample, of the same base, which are given the policies' adapters; the base itself where
        there are no `urls`.

        Args:
            folders: of each policy's adapter; None is the bare base.
            names: of the policies that are asked for.

        Raises:
            ConnectionError: a server is not up.
            ValueError: one does not speak for a policy.
        """
        if not urls:
            yield
            return
        servers, known = VLLMServers(urls), dict.fromkeys(names)
        known |= {n: Adapter(f"{n}-{fingerprint(f)}", f.resolve()) for n in names if (f := folders[n]) is not None}
        servers.wait_until_up()
        try:
            servers.check_same(self, {f"policy:{name}": adapter for name, adapter in known.items()})
            self._servers = servers, known
            yield
        finally:
            self._servers = None
            for adapter in filter(None, known.values()):
                servers.unload(adapter)

    @torch.no_grad()
    def logprobs_of(self, rollout: Rollout, policy: str, temperature: float = 1.0) -> tuple[list[float], list[float]]:
        """Log-probability of each completion, nats: under the policy and under the bare base, at the temperature of the
        sampling, as PPO has them; at 1 where the likeliest token is taken."""
        ids, mask = rollout.input_ids.to(self.device), rollout.attention_mask.to(self.device)
        width, divisor = rollout.completion_ids.shape[1], temperature or 1.0
        roles: list[Any] = [f"policy:{policy}", "reference"]
        own, base = (self.logprobs(ids, mask, width, role, divisor).double().sum(dim=1).tolist() for role in roles)
        return own, base


class _Scoring:
    """One reward role of several, as `trl_ext.rewards.reward_role` asks for scores."""

    def __init__(self, base: Policies, reward: RewardAdapter) -> None:
        self._base, self._reward = [base], reward  # in a list: no module inside itself
        self.causal_lm, self.device = base.causal_lm, base.device

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """As `SharedBase.scores`."""
        [base], reward = self._base, self._reward
        batch = base._aligned(input_ids, attention_mask, 0, 1.0)
        states = batch.final(base.hidden_states({reward.adapter: batch})[reward.adapter], reward.pad_token_id)
        scores: Tensor = reward.head(states.float()).squeeze(-1)
        return scores


# Random numbers ------------------------------------------------------------------------------------------------------


def uniforms(keys: Sequence[Sequence[Any]], tokens: int) -> Tensor:
    """Random numbers in [0, 1) for each row, (rows, tokens) float64. They follow from the row's key alone, such as
    (seed, prompt, sample): neither from other rows nor from what was sampled before."""
    rows = []
    for key in keys:
        seed = int.from_bytes(hashlib.sha256(repr(tuple(key)).encode()).digest()[:8], "little", signed=True)
        rows.append(torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


class Drawn(LogitsProcessor):
    """Leaves one token a row: the first whose cumulative probability exceeds the row's next random number u,

        token = min {k : sum_{j <= k} p_j > u},    p = softmax(logits / temperature)

    which samples from p (Devroye 1986, "Non-Uniform Random Variate Generation", section III.2). A row's token depends
    on its own u alone, and policies that are nearly the same choose nearly the same tokens by the same u.

    Args:
        uniforms: (rows, most tokens) float64.
        width: columns of the prompts.
    """

    def __init__(self, uniforms: Tensor, temperature: float, width: int) -> None:
        self.uniforms, self.temperature, self.width = uniforms, temperature, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (rows, vocabulary): 0 for the token that was drawn, minus infinity for the others."""
        u = self.uniforms[:, input_ids.shape[1] - self.width].to(scores.device).unsqueeze(1)
        cumulative = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _Served:
    """vLLM servers, each completion with a seed that belongs to its row."""

    def __init__(self, servers: VLLMServers, adapter: Adapter | None, uniforms: Tensor, temperature: float) -> None:
        self.servers, self.adapter, self.temperature = servers, adapter, temperature
        self.seeds = (uniforms[:, 0] * 2**31).long().tolist()

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: Any) -> Answers:
        """See `Generator.answers`."""
        how = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            eos_token_id=config.eos_token_id,
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            top_k=0,
        )
        requests = [request_of(ids, how, seed) for ids, seed in zip(prompt_ids, self.seeds, strict=True)]
        ids = [ids for ids, _ in self.servers.complete(requests, self.adapter)]
        check_whole(ids, how)
        return Answers(ids)


class _Generator:
    """Transformers' `generate` with random numbers that belong to the rows."""

    def __init__(self, base: Policies, uniforms: Tensor, temperature: float) -> None:
        self.base, self.uniforms, self.temperature = base, uniforms, temperature

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: Any) -> Answers:
        """See `Generator.answers`."""
        completions: dict[int, list[int]] = {}
        rows_by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        # Some models shift by padding what they read: there only prompts of one length share a batch.
        groups = itertools.groupby(rows_by_length, lambda row: self.base.pads_left or len(prompt_ids[row]))
        for rows in (list(group) for _, group in groups):
            ids, mask = padded([prompt_ids[row] for row in rows], config.pad_token_id, left=True)
            width = ids.shape[1]
            drawn = [Drawn(self.uniforms[rows], self.temperature, width)] if self.temperature else []
            written = self.base.generate(
                role=role,
                input_ids=ids.to(self.base.device),
                attention_mask=mask.long().to(self.base.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(drawn),
            )
            completions |= zip(rows, written[:, width:].tolist(), strict=True)
        return Answers([completions[row] for row in range(len(prompt_ids))])
