"""One base model, four roles: policy, reference, value and reward as adapters and heads over shared weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from trl_ext.core import mean_score
from trl_ext.roles import adapters as files
from trl_ext.roles import assembly
from trl_ext.roles.adapted import AdaptedModel
from trl_ext.roles.aligned import AlignedBatch
from trl_ext.roles.lm_head import head_of, trunk_of
from trl_ext.roles.memory import memory_by_role
from trl_ext.roles.sharding import settle, shared_as
from trl_ext.roles.switching import activate, belongs_to, generating_by, restored, under
from trl_ext.roles.trl_views import RoleView

Role = Literal["policy", "reference", "value", "reward"]
ROLES: tuple[Role, ...] = ("policy", "reference", "value", "reward")
Reward = str | Path | Sequence[str | Path] | None


class RoleScores(NamedTuple):
    """What `SharedBase.score_pass` returns.

    Attributes:
        ref_logprobs: (batch, completion), nats.
        values: (batch, completion).
        scores: (batch,); NaN where the base has no reward role.
    """

    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor


class SharedBase(AdaptedModel):
    """A causal language model whose weights are loaded once and used by four roles.

    Build it with `from_pretrained` or `from_model`. Ids come left- or right-padded with their mask; the last
    `num_completion_tokens` columns are the completion. What lies under padding comes back as 0.

    Attributes:
        model: the PEFT model with every role's adapter.
        heads: scalar heads, "value" and, with a reward role, "reward"; float32, (hidden size -> 1).
        adapters: adapter name of each role; None stands for the bare base. A role that is missing has no entry. Of
            several reward roles each has an entry and a head: "reward_0", "reward_1", ...
        reward_pad_token_ids: padding, by id, to each reward role: its score is read at the last token that is another
            one. None: at the last real token.
        reference_named: whether who built it said which model the reference is; the doctor takes a named one as meant.
        combine_scores: makes one score of several reward roles', (batch, reward roles) -> (batch,): their mean, unless
            another function of `trl_ext.core` is put here. (PPO combines them by its own settings, normalised.)
        role: who speaks where a call names no role; `use` says it.
    """

    def __init__(
        self,
        model: PeftModel,
        adapters: dict[str, str | None],
        heads: dict[str, nn.Module],
        reward_pad_token_ids: dict[str, int | None] | None = None,
        reference_named: bool = True,
    ) -> None:
        super().__init__(model)
        self.adapters = adapters
        self.heads = nn.ModuleDict(heads)
        self.reward_pad_token_ids = reward_pad_token_ids or {}
        self.reference_named = reference_named
        self.combine_scores: Callable[[Tensor], Tensor] = mean_score
        self.role: str = "policy"
        self._lm_head = head_of(self.causal_lm)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        quantization_config: Any | None = None,
        policy: LoraConfig | str | Path | None = None,
        value: str | Path = "adapter",
        reward: Reward = None,
        reference: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any | None = None,
        **model_kwargs: Any,
    ) -> SharedBase:
        """Load the base once and lay the roles on it.

        Args:
            model_name_or_path: a causal language model, or an adapter over one (a folder, or a name on the Hub), which
                is then the policy to start from.
            quantization_config: `transformers.BitsAndBytesConfig` for a 4-bit or 8-bit base; None: the checkpoint's
                own, if it has one.
            policy: LoraConfig of a new policy adapter, or a saved one to start from; None: LoRA of rank 16 on every
                linear layer. Saved adapters are given by their folder or their name on the Hub.
            value: "adapter" (own LoRA like the policy's, scalar head starting at 0), "head" (scalar head on the
                policy's trunk), or the folder of a saved value or reward adapter to start from.
            reward: folder of what TRL's RewardTrainer saved with LoRA, or a list of such folders: several reward roles,
                "reward_0", "reward_1", ...; None: no reward role.
            reference: folder of an adapter that stays frozen; "base", the bare base; "copy", a frozen copy of the saved
                adapter that the policy starts from. None: the bare base, or "copy" where the model named is an adapter.
            dtype: of the base's weights; None: float32, or bfloat16 under a quantisation. A checkpoint that was saved
                quantised is loaded as it was saved.
            device_map: as in Transformers.
            **model_kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`.

        Raises:
            FileNotFoundError: a folder is missing or holds no adapter.
            TypeError: an argument is of the wrong kind.
            ValueError: an adapter belongs to another base or is not one that roles can share it with, or arguments
                contradict each other or the checkpoint.
        """
        if not isinstance(model_name_or_path, (str, Path)):
            raise TypeError(
                f"model_name_or_path must be a model's name or folder, not {type(model_name_or_path).__name__}: give a "
                "model in memory to SharedBase.from_model."
            )
        hub = {key: model_kwargs[key] for key in files.HUB if key in model_kwargs}
        name = files.named(str(model_name_or_path), **hub)
        if name.adapter is not None:
            if policy is not None:
                raise ValueError(
                    f"{str(model_name_or_path)!r} is an adapter over {name.base!r}, and a policy was given too: leave "
                    f"the policy out to train this adapter, or give {name.base!r} as the model."
                )
            reference = "copy" if reference is None else reference
            policy, model_kwargs = name.adapter, {k: v for k, v in model_kwargs.items() if k != "subfolder"}
            model_kwargs["revision"] = name.revision or "main"
        plan = assembly.plan(name.base, policy, value, reward, reference)
        model = assembly.load_base(name.base, quantization_config, dtype, device_map, **model_kwargs)
        base = cls(*assembly.assemble(model, plan))
        if (revision := model_kwargs.get("revision")) not in (None, "main"):
            for config in base.model.peft_config.values():
                config.revision = revision  # so that who loads a saved role gets this base
        return base

    @classmethod
    def from_model(
        cls,
        model: Any,
        policy: LoraConfig | str | Path | None = None,
        value: str | Path = "adapter",
        reward: Reward = None,
        reference: str | Path | None = None,
    ) -> SharedBase:
        """Lay the roles on a model that is in memory.

        The active adapter of a `PeftModel`, or of a model that Transformers loaded by an adapter's name, becomes the
        policy, and, unless `reference` says otherwise, a frozen copy of it the reference. Other arguments as in
        `from_pretrained`.
        """
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        name = getattr(getattr(causal_lm, "config", None), "name_or_path", "")
        plan = assembly.plan(name, policy, value, reward, reference)
        return cls(*assembly.assemble(model, plan))

    # Roles ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, role: str) -> Iterator[SharedBase]:
        """Forwards inside use the adapter of `role`, and calls that name no role speak for it. On exit the active
        adapter, every requires_grad and every train/eval flag are as before, also when the body raises.

        Raises:
            ValueError: no such role, or the base was built without it, or "reward" where it has several.
        """
        adapter, before = self._adapter(role), self.role
        with restored(self):
            activate(self.model, adapter)
            self.role = role
            try:
                yield self
            finally:
                self.role = before

    def has_role(self, role: str) -> bool:
        """Whether the base was built with this role; "reward": with at least one."""
        return role in self.adapters or (role == "reward" and bool(self.reward_roles))

    @property
    def reward_roles(self) -> tuple[str, ...]:
        """Names of the reward roles: ("reward",) of one, ("reward_0", "reward_1", ...) of several, () of none."""
        return tuple(role for role in self.adapters if role == "reward" or role.startswith("reward_"))

    def _members(self, role: str) -> tuple[str, ...]:
        """The role itself, or those that "reward" stands for."""
        return self.reward_roles or (role,) if role == "reward" else (role,)

    def _adapter(self, role: str) -> str | None:
        if role == "reward" and len(self.reward_roles) > 1:
            raise ValueError(
                f"This base has {len(self.reward_roles)} reward roles: choose one of {', '.join(self.reward_roles)}."
            )
        known = dict.fromkeys((*ROLES, *self.adapters))
        if role not in known:
            raise ValueError(f"Unknown role {role!r}: choose one of {', '.join(known)}.")
        if role not in self.adapters:
            raise ValueError(
                f"This base has no {role} role: build it with SharedBase.from_pretrained(..., {role}=...)."
            )
        return self.adapters[role]

    def trainable_parameters(self, role: Literal["policy", "value"]) -> list[nn.Parameter]:
        """The parameters that training `role` moves: its adapter and its head. On a shared trunk the trunk's adapter is
        the policy's."""
        adapter = [p for name, p in self.model.named_parameters() if belongs_to(name, self.adapters[role])]
        if role == "policy":
            return adapter
        head = list(self.heads["value"].parameters())
        return head if self.adapters["value"] == self.adapters["policy"] else adapter + head

    # Outputs of the roles ---------------------------------------------------------------------------------------------

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_completion_tokens: int,
        role: str | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probability of each completion token under `role` (None: the policy, or the role of `use`), (batch,
        num_completion_tokens), nats."""
        batch = self._aligned(input_ids, attention_mask, num_completion_tokens, temperature)
        adapter = self._adapter(role or self.role)
        hidden = batch.predicting(self.hidden_states({adapter: batch})[adapter])
        with under(self.model, adapter):
            return batch.padded(self._lm_head.logprobs(hidden, batch.targets, temperature)[0])

    def values(self, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int) -> Tensor:
        """Value before each completion token is chosen, (batch, num_completion_tokens)."""
        return self(input_ids, attention_mask, num_completion_tokens, roles=("value",))["values"]

    def scores(self, input_ids: Tensor, attention_mask: Tensor, role: str = "reward") -> Tensor:
        """The reward role's score of each row, (batch,), read at the row's last real token (that is not
        the reward model's padding: see `reward_pad_token_ids`). Those of several reward roles are made one by
        `combine_scores`; `role` names one of them."""
        return self(input_ids, attention_mask, 0, roles=(role,))["scores"]

    @torch.no_grad()
    def score_pass(
        self, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int, temperature: float = 1.0
    ) -> RoleScores:
        """Reference log-probs, values and scores without gradient; one forward for all where rows are few, as `forward`
        says."""
        roles = ("reference", "value", "reward") if self.has_role("reward") else ("reference", "value")
        outputs = self(input_ids, attention_mask, num_completion_tokens, roles=roles, temperature=temperature)
        scores = outputs.get("scores", outputs["values"].new_full((input_ids.shape[0],), float("nan")))
        return RoleScores(outputs["ref_logprobs"], outputs["values"], scores)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_completion_tokens: int,
        roles: Sequence[str] | None = None,
        temperature: float = 1.0,
        reward_suffix_ids: Sequence[int] = (),
        reward_suffix_rows: Tensor | None = None,
        entropy_grad: bool = False,
    ) -> dict[str, Tensor]:
        """The outputs of several roles for one batch; roles that share an adapter share a forward.

        Without gradients, roles with different adapters share one forward too where rows are few (up to 512 tokens a
        role over a quantised base, 256 over another): these travel in one batch, and the base's weights are read
        (and dequantised) once.

        Args:
            input_ids, attention_mask: (batch, columns).
            num_completion_tokens: how many of the last columns are completion.
            roles: whose outputs to compute, "reward" standing for every reward role; None: the policy's, or those of
                the role of `use`.
            temperature: logits are divided by it before log-probabilities.
            reward_suffix_ids: ids that reward roles alone read after the rows marked in `reward_suffix_rows`
                (batch,) bool: what a chat template writes after a completion.
            entropy_grad: let the policy's entropy carry a gradient.

        Returns:
            policy: "logprobs" and "entropy"; reference: "ref_logprobs"; value: "values", each (batch,
            num_completion_tokens); reward: "scores" (batch,), which `combine_scores` makes of "scores_by_role" (batch,
            reward roles) where there are several.

        Raises:
            ValueError: shapes that do not fit, a row without a real token, an id that the model does not have, a
                temperature that is not above 0, or a role that the base was built without.
        """
        batch = self._aligned(input_ids, attention_mask, num_completion_tokens, temperature)
        views: dict[str | None, AlignedBatch] = {}
        roles = [name for role in ((self.role,) if roles is None else roles) for name in self._members(role)]
        for role in roles:
            views[self._adapter(role)] = batch
        rewards = [role for role in roles if role in self.reward_roles]
        if rewards and reward_suffix_rows is not None:
            longer = batch.extended(reward_suffix_ids, reward_suffix_rows)
            views |= {self._adapter(role): longer for role in rewards}
        hidden = self.hidden_states(views)
        outputs: dict[str, Tensor] = {}
        scores: list[Tensor] = []
        for role in roles:
            adapter = self._adapter(role)
            view, states = views[adapter], hidden[adapter]
            if role in ("policy", "reference"):
                with under(self.model, adapter):
                    logprobs, entropy = self._lm_head.logprobs(
                        view.predicting(states), view.targets, temperature, entropy_grad
                    )
                outputs["logprobs" if role == "policy" else "ref_logprobs"] = view.padded(logprobs)
                if role == "policy":
                    outputs["entropy"] = view.padded(entropy)
            elif role == "value":
                outputs["values"] = view.padded(self._read_head("value", view.predicting(states)))
            else:
                scores.append(self._read_head(role, view.final(states, self.reward_pad_token_ids.get(role))))
        if len(scores) > 1:
            outputs["scores_by_role"] = torch.stack(scores, dim=1)
            outputs["scores"] = self.combine_scores(outputs["scores_by_role"])
        elif scores:
            outputs["scores"] = scores[0]
        return outputs

    def _aligned(self, ids: Tensor, mask: Tensor, num_completion_tokens: int, temperature: float) -> AlignedBatch:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}: log-probabilities are taken at one above 0.")
        batch = AlignedBatch.of(ids, mask, num_completion_tokens)
        vocabulary = self.causal_lm.get_input_embeddings().weight.shape[0]
        lowest, highest = torch.stack(batch.ids.aminmax()).tolist()
        if lowest < 0 or highest >= vocabulary:
            row, column = ((batch.ids < 0) | (batch.ids >= vocabulary)).nonzero()[0].tolist()
            raise ValueError(
                f"Row {row} of input_ids has the id {int(batch.ids[row, column])}, but the model has {vocabulary} ids: "
                "was it tokenized for another model?"
            )
        return batch

    def _read_head(self, name: str, hidden: Tensor) -> Tensor:
        head: Any = self.heads[name]
        bias = None if head.bias is None else head.bias.float()  # FSDP2 may gather a head in half precision
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.to(head.weight.device, torch.float32), head.weight.float(), bias).squeeze(-1)

    def check_generates(self) -> None:
        """Refuse a model whose completions would be another policy's. What is tried out for that is tried once: before
        the base is shared out.

        Raises:
            ValueError: its `generate` fails, or samples otherwise than its own forward reads.
        """
        fault, _ = self.generate_fault, self.pads_left
        if fault is not None:
            raise ValueError(
                f"{type(self.causal_lm).__name__} cannot be trained on its own samples: {fault}; take another model."
            )

    @torch.no_grad()
    def generate(self, role: str | None = None, **kwargs: Any) -> Tensor:
        """Transformers' `generate` under `role` (None: the policy, or the role of `use`), in eval mode. A
        `generation_config` given here replaces the model's own, so its defaults (a top_k, say) do not change what is
        sampled.

        Raises:
            ValueError: a model whose `generate` samples otherwise than its own forward reads, or prompts of unlike
                length to one that changes what it says with padding on the left.
        """
        self.check_generates()
        mask = kwargs.get("attention_mask")
        if not self.pads_left and mask is not None and not bool(mask.all()):
            raise ValueError(
                f"Padding on the left changes what {type(self.causal_lm).__name__} says: generate from prompts of one "
                "length at a time."
            )
        if self.sharded:
            kwargs["synced_gpus"] = True  # a layer is gathered for all: who is done goes along to the last one's end
        with self.use(role or self.role), self.path.constant():
            self.model.eval()
            with generating_by(self.causal_lm, kwargs.get("generation_config", self.causal_lm.generation_config)):
                return self.model.generate(**kwargs)

    # Memory and files -------------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes of unique parameter and buffer storage: "base", each role's adapter, each head, and their "total". Each
        of several reward roles is shown, as "reward_0", "reward_0_head", ..."""
        return memory_by_role(self.model, self.adapters, self.heads)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write each role's adapter and head. All processes among which the base is shared out must call it; the main
        one writes. policy/ loads with AutoPeftModelForCausalLM; value/, reward/ (of several
        reward roles reward_0/, reward_1/, ...) and reference/ beside it load with `from_pretrained` here (value/ and
        reward/ as PEFT SEQ_CLS adapters too)."""
        self.save_roles(Path(save_directory), policy_folder="policy")

    def save_roles(self, folder: Path, policy_folder: str) -> None:
        """Write every role below `folder`: the policy into `policy_folder` ("" for `folder` itself), value, reference
        and reward roles into folders of their names."""
        names = {role: None if adapter is None else str(adapter) for role, adapter in self.adapters.items()}
        policy, value = names["policy"], names["value"]
        if value == policy:
            names["value"] = None  # a head alone
        # All weights before any file: where writing fails, no process waits for another's part.
        heads: dict[str, nn.Module] = dict(self.heads.items())
        weights = {role: files.weights_of(self.model, name, heads.get(role)) for role, name in names.items()}
        for role, state in weights.items():
            name, place = names[role], folder / (policy_folder if role == "policy" else role)
            if not state:
                continue  # the bare base, or another process writes
            if name is None:
                files.save_head(state, place)
            elif role not in heads:
                files.save_plain_adapter(self.model, name, state, place)
            else:
                note = {"pad_token_id": self.reward_pad_token_ids.get(role)} if role in self.reward_roles else {}
                files.save_scored_adapter(self.model, name, state, place, **note)

    @torch.no_grad()
    def load_trained_roles(self, folder: Path) -> None:
        """Put the policy and value weights that `save_roles(folder, "")` wrote back in place.

        Raises:
            FileNotFoundError: a file is missing.
        """
        settle(self)  # or the head would go into a copy
        for role, part in (("policy", folder), ("value", folder / "value")):
            own_adapter = role == "policy" or self.adapters["value"] != self.adapters["policy"]
            file = part / (files.WEIGHTS if own_adapter else files.HEAD)
            if not file.is_file():
                raise FileNotFoundError(f"{str(file)!r} is missing: this checkpoint does not hold the {role} role.")
            if own_adapter:
                state = {key: tensor for key, tensor in load_file(file).items() if "lora_" in key}
                files.put_lora(self.model, state, str(self._adapter(role)))
            if role == "value":
                state = files.read_score_head(part)
                for name, parameter in self.heads["value"].named_parameters():
                    parameter.copy_(shared_as(state[name], parameter))

    def as_trl_models(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """(policy, value_model, reward_model) that TRL 1.12's PPOTrainer accepts, all over this one base.

        The policy is the PEFT model itself, so that TRL finds the reference by disabling its adapter; pass
        `model_adapter_name="policy", ref_adapter_name="reference"` in TRL's PPOConfig where the base has a frozen
        reference adapter. TRL's `save_model` leaves heads out: `save_pretrained` writes every role.

        Raises:
            ValueError: the base has no reward role, or several.
        """
        if not self.has_role("reward"):
            raise ValueError("This base has no reward role: build it with reward=<folder of a reward adapter>.")
        if len(self.reward_roles) > 1:
            raise ValueError(
                f"TRL's PPOTrainer reads one reward model, and this base has {len(self.reward_roles)} reward roles: "
                "build it with one of them."
            )
        # TRL turns recomputation off and on around each rollout, without regard to roles.
        self.model.gradient_checkpointing_enable = self.gradient_checkpointing_enable
        value, reward = (
            RoleView(self.config, partial(self._backbone_under, role), self.heads[role]) for role in ("value", "reward")
        )
        return self.model, value, reward

    def _backbone_under(self, role: str, **kwargs: Any) -> Any:
        if role == "value" and torch.is_grad_enabled():
            # After its reference's forward TRL has PEFT enable the adapters again, which freezes all but the policy's.
            for parameter in self.trainable_parameters("value"):
                parameter.requires_grad_(True)
        with self.use(role):
            return trunk_of(self.causal_lm)(**kwargs)
