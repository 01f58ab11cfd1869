"""What wrong calls of the API get: one sentence, before anything is trained, and nothing written over.

The rows are part of docs/errors.md, which `python -m tests.recipes.test_bad_input` writes.
"""

import builtins
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.helpers import QUIET
from trl_ext import demo, feedback
from trl_ext.rewards import RewardError, remote, texts
from trl_ext.runs import LOCK


@dataclass(frozen=True)
class Call:
    """One mistake.

    Attributes:
        what: in words.
        code: a line of Python; the names are those of `names`.
        error: what is raised.
        says: part of the sentence.
    """

    what: str
    code: str
    error: str
    says: str


OURS = {"RewardError": RewardError, "FeedbackError": feedback.FeedbackError}

# fmt: off
# ruff: noqa: E501
CALLS = [
    # SharedBase
    Call("a policy that is no LoRA", "SharedBase.from_pretrained(model, policy=PromptTuningConfig(num_virtual_tokens=4))", "TypeError", "policy must be a peft.LoraConfig or the folder of a saved adapter, not PromptTuningConfig."),
    Call("LoRA of rank 0", "SharedBase.from_pretrained(model, policy=LoraConfig(r=0))", "ValueError", "The policy's LoraConfig has r=0: a rank is a positive whole number."),
    Call("LoRA that is scaled to nothing", "SharedBase.from_pretrained(model, policy=LoraConfig(lora_alpha=0))", "ValueError", "The policy's LoraConfig has lora_alpha=0, which scales what is learnt: give a positive number."),
    Call("LoRA that is scaled to nothing in a layer", "SharedBase.from_pretrained(model, policy=LoraConfig(alpha_pattern={'q_proj': 0}))", "ValueError", "The policy's LoraConfig has alpha_pattern['q_proj']=0, which scales what is learnt: give a positive number."),
    Call("LoRA that drops all", "SharedBase.from_pretrained(model, policy=LoraConfig(lora_dropout=1.0))", "ValueError", "The policy's LoraConfig has lora_dropout=1.0: give a number from 0 to below 1."),
    Call("nothing for a model", "SharedBase.from_pretrained(None)", "TypeError", "model_name_or_path must be a model's name or folder, not NoneType: give a model in memory to SharedBase.from_model."),
    Call("a model's folder that is not there", "SharedBase.from_pretrained('./missing')", "FileNotFoundError", "The model './missing' does not exist: give a folder, or a name on the Hub."),
    Call("a name for a model in memory", "SharedBase.from_model(model)", "TypeError", "The model is of type str: give a model of AutoModelForCausalLM, or one PeftModel of it."),
    Call("a full copy of the head in the policy", "SharedBase.from_pretrained(model, policy=LoraConfig(modules_to_save=['lm_head']))", "ValueError", "The policy's LoraConfig has modules_to_save=['lm_head']: roles share every full weight, so only LoRA matrices can be trained; remove modules_to_save."),
    Call("LoRA on the LM head", "SharedBase.from_pretrained(model, policy=LoraConfig(target_modules=['lm_head']))", "ValueError", "The policy's LoraConfig targets the LM head, whose weight log-probabilities are computed from directly: the adapter would never train; remove it from target_modules."),
    Call("LoRA that rewrites the base", "SharedBase.from_pretrained(model, policy=LoraConfig(init_lora_weights='pissa'))", "ValueError", "The policy's LoraConfig has init_lora_weights='pissa', which rewrites the weights that all roles share, or needs data"),
    Call("biases of the base in the policy", "SharedBase.from_pretrained(model, policy=LoraConfig(bias='all'))", "ValueError", "The policy's LoraConfig has bias='all': roles share every full weight, so only LoRA matrices can be trained; remove bias."),
    Call("tokens of the base in the policy", "SharedBase.from_pretrained(model, policy=LoraConfig(trainable_token_indices=[3]))", "ValueError", "has trainable_token_indices=[3]: roles share every full weight"),
    Call("a reward adapter that is not there", "SharedBase.from_pretrained(model, reward='missing')", "FileNotFoundError", "The reward role's folder 'missing' does not exist"),
    Call("one of several reward adapters that is not there", "SharedBase.from_pretrained(model, reward=['roles/value', 'missing'])", "FileNotFoundError", "The reward role's folder 'missing' does not exist"),
    Call("a list of no reward adapters", "SharedBase.from_pretrained(model, reward=[])", "ValueError", "reward is an empty list: give at least one folder of a reward adapter, or leave it out."),
    Call("a policy adapter that is not there", "SharedBase.from_pretrained(model, policy='missing')", "FileNotFoundError", "The policy role's folder 'missing' does not exist"),
    Call("a value adapter that is not there", "SharedBase.from_pretrained(model, value='missing')", "FileNotFoundError", "The value role's folder 'missing' does not exist"),
    Call("a reference adapter that is not there", "SharedBase.from_pretrained(model, reference='missing')", "FileNotFoundError", "The reference role's folder 'missing' does not exist"),
    Call("a reward folder without an adapter", "SharedBase.from_pretrained(model, reward='empty')", "FileNotFoundError", "The reward role's folder 'empty' holds no adapter_config.json: give the folder that save_model() or save_pretrained() wrote for a LoRA adapter."),
    Call("a reward adapter without weights", "SharedBase.from_pretrained(model, reward='no_weights')", "FileNotFoundError", "The reward role's folder 'no_weights' holds no adapter_model.safetensors: save the adapter as safetensors."),
    Call("pickled weights", "SharedBase.from_pretrained(model, reward='pickled')", "FileNotFoundError", "save the adapter as safetensors."),
    Call("weights that are cut off", "SharedBase.from_pretrained(model, reward='cut_off')", "ValueError", "adapter_model.safetensors' are not whole"),
    Call("an adapter with a weight missing", "SharedBase.from_pretrained(model, policy='incomplete')", "ValueError", "The adapter in 'incomplete' lacks weights that its config promises"),
    Call("an adapter of another base", "SharedBase.from_pretrained(model, policy='of_another_base')", "ValueError", "The policy adapter in 'of_another_base' was trained over 'somebody/else', but the base is"),
    Call("a reward adapter of another base", "SharedBase.from_pretrained(model, reward='of_another_base')", "ValueError", "The reward adapter in 'of_another_base' was trained over 'somebody/else', but the base is"),
    Call("an adapter that is no LoRA", "SharedBase.from_pretrained(model, policy='prompt_tuning')", "ValueError", "The adapter in 'prompt_tuning' is of type 'PROMPT_TUNING': roles share a base through LoRA only."),
    Call("biases of the base in a reference", "SharedBase.from_pretrained(model, reference='biases')", "ValueError", "The adapter in 'biases' has bias='all': roles share every full weight, so only LoRA matrices can be trained; train it again without bias."),
    Call("an adapter of another PEFT", "SharedBase.from_pretrained(model, policy='of_tomorrow')", "ValueError", "does not know it; train it again without use_tomorrow, or install the PEFT that it was trained with."),
    Call("more than LoRA in an adapter", "SharedBase.from_pretrained(model, policy='with_norm')", "ValueError", "The adapter in 'with_norm' holds 'base_model.model.model.norm.weight' among its weights, which is not LoRA: train it again with LoRA on linear layers alone."),
    Call("a new policy over an adapter", "SharedBase.from_pretrained('roles/policy', policy=LoraConfig())", "ValueError", "and a policy was given too: leave the policy out to train this adapter, or give"),
    Call("the folder of all roles for a policy", "SharedBase.from_pretrained(model, policy='roles')", "FileNotFoundError", "The policy role's folder 'roles' holds one folder a role: give 'roles/policy'."),
    Call("a reward adapter for a model", "SharedBase.from_pretrained('roles/value')", "ValueError", "The adapter in 'roles/value' has modules_to_save=['score']: roles share every full weight"),
    Call("two precisions", "SharedBase.from_pretrained(model, dtype='float32', torch_dtype='bfloat16')", "ValueError", "dtype is 'float32' and torch_dtype, its older name, is 'bfloat16': leave torch_dtype out."),
    Call("a policy for a reward model", "SharedBase.from_pretrained(model, reward='roles/policy')", "ValueError", "'roles/policy' holds no score head: a reward or value role needs one number a sequence, as TRL's RewardTrainer with a LoraConfig(task_type='SEQ_CLS') saves it."),
    Call("a role that there is not", "base.use('critic').__enter__()", "ValueError", "Unknown role 'critic': choose one of policy, reference, value, reward."),
    Call("a role that was not built", "base.scores(ids, mask)", "ValueError", "This base has no reward role: build it with SharedBase.from_pretrained(..., reward=...)."),
    Call("more completion than text", "base.values(ids, mask, 9)", "ValueError", "num_completion_tokens is 9, but the rows have 4 columns."),
    Call("a mask of another shape", "base.values(ids, mask[:, :2], 2)", "ValueError", "input_ids (1, 4) and attention_mask (1, 2) differ in shape."),
    Call("no row", "base.logprobs(ids[:0], mask[:0], 2)", "ValueError", "input_ids is of shape (0, 4): give at least one row, (batch, columns)."),
    Call("ids of another tokenizer", "base.logprobs(ids + 10**6, mask, 2)", "ValueError", "ids: was it tokenized for another model?"),
    Call("log-probs at temperature 0", "base.logprobs(ids, mask, 2, temperature=0)", "ValueError", "temperature is 0: log-probabilities are taken at one above 0."),
    Call("a row of padding alone", "base.values(ids, 0 * mask, 2)", "ValueError", "Row 0 of attention_mask has no real token"),
    Call("an adapter for a model that has one", "SharedBase.from_model(peft_model, policy=LoraConfig())", "ValueError", "The model is a PeftModel already, and a policy adapter was given too: pass the model without its adapter, or leave the policy out to train the adapter it has."),
    Call("a model whose adapters are disabled", "peft_model.base_model.disable_adapter_layers() or SharedBase.from_model(peft_model)", "ValueError", "The PeftModel's adapters are disabled: enable the one to train before building the roles."),
    Call("a model whose adapter is merged", "peft_model.merge_adapter() or SharedBase.from_model(peft_model)", "ValueError", "merged into its weights: call unmerge_adapter() before building the roles."),
    Call("recomputation that mixes up adapters", "base.gradient_checkpointing_enable({'use_reentrant': True})", "ValueError", "recomputes under the wrong adapter"),
    Call("TRL's models without a reward role", "base.as_trl_models()", "ValueError", "This base has no reward role: build it with reward=<folder of a reward adapter>."),
    # PPOTrainer
    Call("a number for a model", "PPOTrainer(3, judge, args, prompts)", "TypeError", "model must be a name, a PreTrainedModel, a PeftModel or a SharedBase, not int."),
    Call("another kind of adapter", "PPOTrainer(model, judge, args, prompts, peft_config=PromptTuningConfig(num_virtual_tokens=4))", "TypeError", "peft_config must be a peft.LoraConfig, not PromptTuningConfig"),
    Call("new LoRA over an adapter", "PPOTrainer('roles/policy', judge, args, prompts, peft_config=LoraConfig())", "ValueError", "which is trained further: leave peft_config out, or give"),
    Call("an adapter without a score head as reward model", "PPOTrainer(base, 'roles/policy', args, prompts)", "ValueError", "'roles/policy' holds no score head"),
    Call("settings first, as in TRL 1.12", "PPOTrainer(args, None, model, None, judge, prompts)", "TypeError", "the order is PPOTrainer(model, reward_funcs, args, train_dataset, eval_dataset, processing_class)"),
    Call("an argument of yesterday", "PPOTrainer(model, judge, args, prompts, ref_model=None)", "TypeError", "PPOTrainer has no 'ref_model': use SharedBase.from_pretrained(reference=...), or leave it out"),
    Call("LoRA for a base that has it", "PPOTrainer(base, judge, args, prompts, peft_config=LoraConfig())", "ValueError", "The SharedBase has its adapters already: leave peft_config out."),
    Call("a quantisation that comes too late", "PPOTrainer(base, judge, args, prompts, quantization_config=four_bit)", "ValueError", "The model is loaded already"),
    Call("a way of loading that comes too late", "PPOTrainer(base, judge, PPOConfig(**quiet, model_init_kwargs={'dtype': 'float32'}), prompts)", "ValueError", "The model is loaded already: give model_init_kwargs where you load it, not to PPOConfig."),
    Call("nothing that gives a score", "PPOTrainer(base, None, args, prompts)", "ValueError", "Nothing gives a score: pass reward_funcs, or a SharedBase built with reward=<adapter folder>."),
    Call("no prompts", "PPOTrainer(base, judge, args)", "ValueError", "train_dataset is missing"),
    Call("a list for a dataset", "PPOTrainer(base, judge, args, ['a', 'b'])", "TypeError", "train_dataset must be a datasets.Dataset with a 'prompt' column, not list."),
    Call("a dataset of nothing", "PPOTrainer(base, judge, args, prompts.select([]))", "ValueError", "train_dataset is empty: it needs at least one prompt."),
    Call("another name for the prompts", "PPOTrainer(base, judge, args, prompts.rename_column('prompt', 'query'))", "ValueError", "train_dataset has no 'prompt' column, only ['query']"),
    Call("evaluations on nothing", "PPOTrainer(base, judge, PPOConfig(**quiet, eval_strategy='steps', eval_steps=1), prompts)", "ValueError", "eval_strategy is 'steps', but there is no eval_dataset: give one."),
    Call("an evaluation set without prompts", "PPOTrainer(base, judge, args, prompts, eval_dataset=prompts.rename_column('prompt', 'query'))", "ValueError", "eval_dataset has no 'prompt' column"),
    Call("a model for a tokenizer", "PPOTrainer(base, judge, args, prompts, processing_class=base)", "TypeError", "processing_class must be a tokenizer, not SharedBase."),
    Call("a tokenizer without an end", "PPOTrainer(base, judge, args, prompts, processing_class=without_eos)", "ValueError", "The tokenizer has no EOS token, so no completion could ever end"),
    Call("conversations without a template", "PPOTrainer(base, judge, args, chats, processing_class=without_template)", "ValueError", "the tokenizer has no chat template"),
    Call("a number for a reward function", "PPOTrainer(base, 3, args, prompts)", "TypeError", "A reward function must be a callable, a model or a model's name, not int."),
    Call("a reward function that asks for what is not there", "PPOTrainer(base, lambda completions, city: [], args, prompts)", "ValueError", "asks for 'city', and is called by name with"),
    Call("a prompt that leaves no room for its answer", "PPOTrainer(base, judge, args, Dataset.from_dict({'prompt': ['a'] * 4 + ['a' * 999]}))", "ValueError", "The prompt in row 4 of train_dataset has 999 tokens and 4 may follow, but the model reads 128"),
    Call("a search that takes one row alone", "PPOTrainer(model, judge, PPOConfig(**quiet, generation_kwargs={'prompt_lookup_num_tokens': 10}), prompts)", "ValueError", "generation_kwargs: assisted generate is only supported for batch_size = 1"),
    Call("words that are not to be said, as a text", "PPOTrainer(model, judge, PPOConfig(**quiet, generation_kwargs={'bad_words_ids': 'abc'}), prompts)", "ValueError", "generation_kwargs: `bad_words_ids` has to be a non-empty list, but is abc."),
    Call("a search that is not in Transformers", "PPOTrainer(model, judge, PPOConfig(**quiet, generation_kwargs={'num_beams': 4, 'num_beam_groups': 2}), prompts)", "ValueError", "generation_kwargs: Group Beam Search requires"),
    Call("more tokenizers than reward functions", "PPOTrainer(base, judge, args, prompts, reward_processing_classes=[None, None])", "ValueError", "reward_processing_classes has 2 entries for 1 reward functions: give one each."),
    Call("weights for reward functions that are not there", "PPOTrainer(base, judge, PPOConfig(**quiet, reward_weights=[1.0, 2.0]), prompts)", "ValueError", "reward_weights has 2 entries for 1 reward functions: give one each."),
    Call("a pretraining term without texts", "PPOTrainer(base, judge, PPOConfig(**quiet, ptx_coef=0.1), prompts)", "ValueError", "the pretraining term needs both."),
    Call("texts without a text", "PPOTrainer(base, judge, PPOConfig(**quiet, ptx_coef=0.1), prompts, ptx_dataset=prompts)", "ValueError", "ptx_dataset has no 'text' column, only ['prompt']"),
    Call("a text of nothing among the texts", "PPOTrainer(base, judge, PPOConfig(**quiet, ptx_coef=0.1), prompts, ptx_dataset=Dataset.from_dict({'text': ['a', '']}))", "ValueError", "ptx_dataset has no text in row 1: filter such rows out."),
    Call("a checkpoint that is not there", "PPOTrainer(base, judge, args, prompts).train(resume_from_checkpoint='missing')", "FileNotFoundError", "this checkpoint does not hold the policy role."),
    Call("no checkpoint to go on from", "PPOTrainer(base, judge, args, prompts).train(resume_from_checkpoint=True)", "ValueError", "No valid checkpoint found"),
    Call("a function that gives too few scores", "PPOTrainer(base, too_few, args, prompts).train()", "RewardError", "Reward function 'too_few' returned 1 values for 4 completions: return one each."),
    # PPOConfig, RewardConfig
    Call("temperature 0", "PPOConfig(temperature=0)", "ValueError", "temperature is 0: it must be positive."),
    Call("half a pass over a rollout", "PPOConfig(num_ppo_epochs=0.5)", "ValueError", "num_ppo_epochs is 0.5: it must be a whole number, at least 1."),
    Call("a coefficient that nothing reads", "PPOConfig(reward_ensemble='min', reward_uncertainty_coef=2.0)", "ValueError", "reward_uncertainty_coef is 2.0, but reward_ensemble 'min' does not read it: leave it out."),
    Call("samples for a normalisation that is not asked for", "PPOConfig(normalization_samples=64)", "ValueError", "normalization_samples is 64, but score_normalization 'none' does not read it: leave it out."),
    Call("a KL coefficient that is no number", "PPOConfig(kl_coef=float('nan'))", "ValueError", "kl_coef is nan: it must be at least 0."),
    Call("compiled recomputation", "PPOConfig(torch_compile=True)", "ValueError", "torch_compile cannot follow recomputation that restores a role's adapter: set gradient_checkpointing to False, or leave torch_compile out."),
    Call("two lengths of a run", "PPOConfig(max_steps=2, total_episodes=20)", "ValueError", "max_steps is 2 and total_episodes is 20, which is 12 steps here: each says how long the run is, so leave one of them out."),
    Call("a setting of yesterday", "PPOConfig(response_length=53)", "TypeError", "PPOConfig has no 'response_length': it is max_completion_length here."),
    Call("a misspelt option", "PPOConfig(kl_coeff=0.1)", "TypeError", "kl_coeff"),
    Call("an unknown objective for a reward model", "FeedbackRewardConfig(objective='elo')", "ValueError", "objective is 'elo': choose one of"),
    Call("pairs for a regression", "FeedbackRewardTrainer(model, FeedbackRewardConfig(use_cpu=True, bf16=False, objective='regression'), train_dataset=pairs)", "ValueError", "the objective 'regression' needs"),
    Call("a rating that is no number", "FeedbackRewardTrainer(model, FeedbackRewardConfig(use_cpu=True, bf16=False, objective='regression'), train_dataset=Dataset.from_dict({'completion': ['a', 'b'], 'rating': [1.0, float('nan')]}))", "ValueError", "Row 1 of train_dataset, column 'rating': nan is not a number."),
    Call("a nucleus above 1 in generation_kwargs", "PPOConfig(generation_kwargs={'top_p': 2.0})", "ValueError", "generation_kwargs['top_p'] is 2.0: it must be positive and at most 1."),
    Call("a dict that is cut short", "PPOConfig(generation_kwargs='{bad')", "ValueError", "generation_kwargs is '{bad', which is no JSON:"),
    Call("noise on the embeddings", "PPOConfig(neftune_noise_alpha=5.0)", "ValueError", "neftune_noise_alpha is 5.0, and noise in training alone makes another policy"),
    Call(
        "the best checkpoint by a loss that there is not",
        "PPOConfig(load_best_model_at_end=True, eval_strategy='steps', save_strategy='steps', eval_steps=8, save_steps=8)",
        "ValueError",
        "load_best_model_at_end looks for the lowest eval_loss, and PPO's evaluation has no loss: set",
    ),
    Call(
        "the tokenizer's arguments for the template's",
        "PPOConfig(chat_template_kwargs={'padding': True})",
        "ValueError",
        "chat_template_kwargs has padding, which is the tokenizer's and not the template's: leave it out",
    ),
    Call("a list for a dict", "PPOConfig(chat_template_kwargs=[1])", "ValueError", "chat_template_kwargs is [1]: give a dict."),
    Call("another temperature to sample at", "PPOConfig(generation_kwargs={'temperature': 0.5})", "ValueError", "generation_kwargs has temperature 0.5, but log-probabilities are taken at temperature 1: set PPOConfig's temperature instead."),
    # Callbacks and controllers
    Call("a KL target of 0", "AdaptiveKLController(0.1, 0)", "ValueError", "target is 0: it must be a positive number."),
    Call("a coefficient below 0", "FixedKLController(-1)", "ValueError", "the initial coefficient is -1: it must be a number, at least 0."),
    Call("the state of another controller", "PIKLController(0.1, 6).load_state_dict({'value': 1.0})", "ValueError", "resume with the controller that the run was started with."),
    Call("a number for a controller", "AdaptiveKLCallback(0.1)", "TypeError", "it needs value, update(kl, n), state_dict() and load_state_dict(state)."),
    Call("an unknown action", "DiagnosticsCallback(on_problem='panic')", "ValueError", "on_problem is 'panic': choose one of"),
    # Reward functions
    Call("a regular expression that is none", "texts.matches('(')", "ValueError", "'(' is no regular expression"),
    Call("no words to look for", "texts.keywords([])", "ValueError", "keywords needs at least one word to look for."),
    Call("a soft limit above the hard one", "texts.length_penalty(soft=9, hard=5)", "ValueError", "length_penalty needs 0 <= soft < hard, not soft 9 and hard 5."),
    Call("a schema that is none", "texts.json_schema({'type': 'texts'})", "ValueError", "The schema is no JSON schema"),
    Call("an address without http", "remote.remote('localhost:8000')", "ValueError", "must begin with http:// or https://."),
    Call("weights that match no rewards", "texts.limited([judge], [], worst=-1, weights=[1, 2])", "ValueError", "limited got 2 weights for 1 rewards: give one each."),
    # Feedback
    Call("feedback of an unknown kind", "feedback.read('ratings.xlsx')", "FeedbackError", "is of no known kind"),
    Call("a number for feedback", "feedback.read(3)", "TypeError", "int"),
    Call("a column that is not there", "feedback.read(prompts)", "FeedbackError", "prompt"),
]
# fmt: on


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every call is made in."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "empty").mkdir()
    (folder / "ratings.xlsx").touch()
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": demo.model_path()}
    for name, changes in {
        "no_weights": {},
        "pickled": {},
        "cut_off": {},
        "prompt_tuning": {"peft_type": "PROMPT_TUNING"},
    }.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    torch.save({"weight": torch.zeros(1)}, folder / "pickled" / "adapter_model.bin")
    (folder / "cut_off" / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    (folder / "prompt_tuning" / "adapter_model.safetensors").write_bytes(b"")
    policy = LoraConfig(r=2, target_modules="all-linear")
    trl_ext.SharedBase.from_pretrained(demo.model_path(), policy=policy).save_pretrained(folder / "roles")
    weights = load_file(folder / "roles" / "policy" / "adapter_model.safetensors")
    of_policy = json.loads((folder / "roles" / "policy" / "adapter_config.json").read_text())
    for name, held, changes in (
        ("incomplete", dict(list(weights.items())[1:]), {}),
        ("of_another_base", weights, {"base_model_name_or_path": "somebody/else"}),
        ("biases", weights, {"bias": "all"}),
        ("of_tomorrow", weights, {"use_tomorrow": True}),
        ("with_norm", {**weights, "base_model.model.model.norm.weight": torch.ones(1)}, {}),
    ):
        (folder / name).mkdir()
        save_file(held, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps({**of_policy, **changes}))
    return folder


@pytest.fixture
def names() -> dict[str, Any]:
    """What a row may speak of."""
    model = demo.model_path()
    quiet = {**QUIET, "output_dir": "out", "per_device_train_batch_size": 4, "max_completion_length": 4}
    without_eos, without_template = (AutoTokenizer.from_pretrained(model) for _ in range(2))
    without_eos.eos_token = None
    without_template.chat_template = None
    lines = [f"a {i}" for i in range(8)]

    def judge(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def too_few(completions: list[Any], **_: Any) -> list[float]:
        return [1.0]

    return {
        **{name: getattr(trl_ext, name) for name in trl_ext.__all__},
        **{module.__name__.rpartition(".")[2]: module for module in (feedback, texts, remote)},
        "Dataset": Dataset,
        "LoraConfig": LoraConfig,
        "PromptTuningConfig": PromptTuningConfig,
        "model": model,
        "peft_model": get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2)),
        "base": trl_ext.SharedBase.from_pretrained(model, policy=LoraConfig(r=2, target_modules="all-linear")),
        "four_bit": transformers.BitsAndBytesConfig(load_in_4bit=True),
        "ids": torch.tensor([[5, 6, 7, 8]]),
        "mask": torch.ones(1, 4, dtype=torch.long),
        "quiet": quiet,
        "args": trl_ext.PPOConfig(**quiet),
        "prompts": Dataset.from_dict({"prompt": lines}),
        "chats": Dataset.from_dict({"prompt": [[{"role": "user", "content": line}] for line in lines]}),
        "pairs": Dataset.from_dict({"prompt": lines, "chosen": lines, "rejected": lines}),
        "without_eos": without_eos,
        "without_template": without_template,
        "judge": judge,
        "too_few": too_few,
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the empty one by which a run claims its folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.what)
def test_a_wrong_call_gets_its_sentence(
    call: Call, here: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    before = contents(here)
    error = OURS.get(call.error) or getattr(builtins, call.error)
    with pytest.raises(error) as raised:
        exec(call.code, names)
    assert type(raised.value).__name__ == call.error
    assert call.says in str(raised.value), str(raised.value)
    assert "\n" not in str(raised.value).strip()
    assert contents(here) == before, "something was written over"
