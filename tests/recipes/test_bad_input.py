"""What wrong input gets, through the real entry points: one sentence, a status, and nothing written over.

python -m tests.recipes.test_bad_input      # writes docs/errors.md from the table below and those of its neighbours
"""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.helpers import FLAGS
from tests.recipes.test_bad_calls import CALLS
from tests.recipes.test_bad_environments import ENVIRONMENTS, Environment
from trl_ext import SharedBase, cli, demo
from trl_ext.runs import LOCK

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
NAMES = {name: f"{name}_lora.py" for name in ("ppo", "reward", "dpo")} | {"loop": "rlhf_loop.py", "trl-ext": "trl-ext"}


@dataclass(frozen=True)
class Row:
    """One mistake.

    Attributes:
        what: in words.
        entry: a recipe ("ppo", "reward", "dpo", "loop"), or "trl-ext".
        arguments: of the command line; files are those of `files`.
        says: part of the sentence.
    """

    what: str
    entry: str
    arguments: str
    says: str


# fmt: off
# ruff: noqa: E501
ROWS = [
    # Settings
    Row("temperature 0", "ppo", "--temperature 0", "temperature is 0.0: it must be positive."),
    Row("a negative KL coefficient", "ppo", "--kl_coef -1", "kl_coef is -1.0: it must be at least 0."),
    Row("no clip range", "ppo", "--cliprange 0", "cliprange is 0.0: it must be positive."),
    Row("a discount above 1", "ppo", "--gamma 1.5", "gamma is 1.5: it must be at least 0 and at most 1."),
    Row("a negative lambda", "ppo", "--lam -0.1", "lam is -0.1: it must be at least 0 and at most 1."),
    Row("a nucleus above 1", "ppo", "--top_p 2", "top_p is 2.0: it must be positive and at most 1."),
    Row("a penalty of the wrong sign", "ppo", "--missing_eos_penalty -1", "missing_eos_penalty is -1.0: it must be positive."),
    Row("a negative value coefficient", "ppo", "--vf_coef -1", "vf_coef is -1.0: it must be at least 0."),
    Row("an entropy bonus of the wrong sign", "ppo", "--entropy_coef -0.1", "entropy_coef is -0.1: it must be at least 0."),
    Row("no pass over a rollout", "ppo", "--num_ppo_epochs 0", "num_ppo_epochs is 0: it must be a whole number, at least 1."),
    Row("no minibatch", "ppo", "--num_mini_batches 0", "num_mini_batches is 0: it must be a whole number, at least 1."),
    Row("no token to answer with", "ppo", "--max_completion_length 0", "max_completion_length is 0: it must be a whole number, at least 1."),
    Row("no answer in a batch", "ppo", "--per_device_train_batch_size 0", "per_device_train_batch_size is 0: it must be a whole number, at least 1."),
    Row("no batch in a step", "ppo", "--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0: it must be a whole number, at least 1."),
    Row("a learning rate below 0", "ppo", "--learning_rate -1", "learning_rate is -1.0: it must be at least 0."),
    Row("a tracker that is not installed", "ppo", "--report_to nobody", "report_to names 'nobody', which is not among the trackers installed here"),
    Row("no episode", "ppo", "--total_episodes 0", "total_episodes is 0: it must be a whole number, at least 1."),
    Row("a dual clip below 1", "ppo", "--dual_clip 0.5", "dual_clip is 0.5: it must be at least 1."),
    Row("a largest ratio below 1", "ppo", "--max_ratio 0.5", "max_ratio is 0.5: it must be at least 1."),
    Row("no time for a reward function", "ppo", "--reward_timeout 0", "reward_timeout is 0.0: it must be positive."),
    Row("an unknown KL estimator", "ppo", "--kl_estimator k4", "invalid choice: 'k4' (choose from"),
    Row("an unknown objective", "ppo", "--objective ppo", "invalid choice: 'ppo' (choose from"),
    Row("an unknown baseline", "ppo", "--baseline none", "invalid choice: 'none' (choose from"),
    Row("an unknown normalisation", "ppo", "--score_normalization zscore", "invalid choice: 'zscore' (choose from"),
    Row("several passes of REINFORCE", "ppo", "--objective reinforce --num_ppo_epochs 4", "set num_ppo_epochs to 1, not 4."),
    Row("a discount where there is no critic", "ppo", "--objective sequence --gamma 0.9", "gamma is 0.9, but objective 'sequence' has no critic here and does not read it: leave it out."),
    Row("a warm-up for a critic that is not there", "ppo", "--objective sequence --value_warmup_rollouts 2", "has no critic here and does not read it: leave it out."),
    Row("a weight for a loss that is not there", "ppo", "--objective sequence --vf_coef 0.5", "vf_coef is 0.5, but objective 'sequence' has no critic here and does not read it: leave it out."),
    Row("a clip range for scores the wrong way round", "ppo", "--reward_clip_range 1 -1", "reward_clip_range is [1.0, -1.0]: give the least and the greatest score"),
    Row("a batch size that finds itself", "ppo", "--auto_find_batch_size true", "auto_find_batch_size would change the number of completions"),
    Row("settings for another generator", "ppo", '--use_vllm true --generation_kwargs {"min_new_tokens":3}', "generation_kwargs are Transformers' and would not reach vLLM"),
    Row("two generators", "ppo", "--use_vllm true --use_transformers_continuous_batching true", "are both set: choose one of them."),
    Row("a server for vLLM in the process", "ppo", "--use_vllm true --vllm_server_port 8001", "vllm_server_port is 8001, but vllm_mode 'colocate' does not read it: leave it out."),
    Row("a vLLM server without http", "ppo", "--use_vllm true --vllm_mode server --vllm_server_base_url box:8000", "vllm_server_base_url is 'box:8000': it must begin with http:// or https://."),
    Row("no vLLM server", "ppo", "--use_vllm true --vllm_mode server --vllm_server_port 9 --vllm_server_timeout 0.1", "No vLLM server is up at http://127.0.0.1:9 after 0.1 s: start one, or correct vllm_server_base_url."),
    Row("a rollout ahead where nobody samples it", "ppo", "--rollouts_ahead 1", "rollouts_ahead is 1, but the base cannot answer while the policy is trained: set use_vllm and vllm_mode 'server'"),
    Row("two rollouts ahead", "ppo", "--rollouts_ahead 2", "invalid choice: '2' (choose from"),
    Row("a rollout ahead without weights", "ppo", "--use_vllm true --vllm_mode server --rollouts_ahead 1 --vllm_importance_sampling_correction false", "leave one of them out."),
    Row("weights without a bound", "ppo", "--vllm_importance_sampling_clip_min 4", "vllm_importance_sampling_clip_min is 4 and vllm_importance_sampling_clip_max is 3: the first must be less."),
    Row("a penalty that continuous batching drops", "ppo", "--use_transformers_continuous_batching true --repetition_penalty 1.1", "Continuous batching knows neither generation_kwargs nor repetition_penalty"),
    Row("a setting that continuous batching does not have", "ppo", '--use_transformers_continuous_batching true --transformers_continuous_batching_config {"page_sizes":16}', "transformers_continuous_batching_config: ContinuousBatchingConfig.__init__() got an unexpected keyword argument 'page_sizes'"),
    Row("a misspelt field of GenerationConfig", "ppo", '--generation_kwargs {"top_kk":3}', "generation_kwargs names 'top_kk', which GenerationConfig does not have: do you mean 'top_k'?"),
    Row("another temperature to sample at", "ppo", '--generation_kwargs {"temperature":0.5}', "generation_kwargs has temperature 0.5, but log-probabilities are taken at temperature 1"),
    Row("groups that do not fill a rollout", "ppo", "--num_generations 3", "which does not divide the 64 completions of a rollout: choose a divisor."),
    Row("a rollout larger than the dataset", "ppo", "--per_device_train_batch_size 5000", "prompts, but one rollout takes 10000"),
    Row("weights that match no functions", "ppo", "--reward_weights 1 2", "reward_weights has 2 entries for 1 reward functions: give one each."),
    Row("the worst of one reward role", "ppo", "--reward_ensemble min", "reward_ensemble is 'min', but there is one reward role: give SharedBase several reward adapters, reward=[folder, folder], or leave reward_ensemble out."),
    Row("an ensemble of none", "reward", "--ensemble 0", "ensemble is 0: it must be at least 1."),
    Row("a pretraining term without texts", "ppo", "--ptx_coef 0.1", "the pretraining term needs both."),
    Row("texts without a pretraining term", "ppo", "--ptx_dataset prompts.jsonl", "the pretraining term needs both."),
    Row("texts without a text", "ppo", "--ptx_coef 0.1 --ptx_dataset prompts.jsonl", "'text'"),
    Row("a KL target of 0", "ppo", "--kl_target 0", "target is 0.0: it must be a positive number."),
    Row("a misspelt option", "ppo", "--learning_rat 1", "learning_rat"),
    Row("a word for a number", "ppo", "--learning_rate fast", "invalid float value: 'fast'"),
    Row("a config that is not there", "ppo", "--config missing.yaml", "missing.yaml"),
    Row("a config that is no YAML", "ppo", "--config broken.yaml", "broken.yaml"),
    Row("a config that is no mapping", "ppo", "--config list.yaml", "list.yaml"),
    Row("an unknown objective for a reward model", "reward", "--objective elo", "objective is 'elo': choose one of pairwise, regression, binary, ranking, all_pairs, probe."),
    Row("an unknown loss for DPO", "dpo", "--loss_type dpo2 sft", "dpo2"),
    # Datasets
    Row("a file that is not there", "ppo", "--dataset missing.jsonl", "The dataset file 'missing.jsonl' does not exist."),
    Row("an empty file", "ppo", "--dataset empty.jsonl", "The dataset file 'empty.jsonl' cannot be read"),
    Row("a file that is no JSON", "ppo", "--dataset broken.jsonl", "The dataset file 'broken.jsonl' cannot be read"),
    Row("half a list", "ppo", "--dataset list.jsonl", "The dataset file 'list.jsonl' cannot be read"),
    Row("a Parquet file that is none", "ppo", "--dataset broken.parquet", "The dataset file 'broken.parquet' cannot be read"),
    Row("another name for the prompts", "ppo", "--dataset queries.jsonl", "queries.jsonl has no 'prompt' column, only ['query']: rename yours to 'prompt'."),
    Row("a column renamed by half", "ppo", "--dataset queries.jsonl --columns query", "The column 'query' is not of the kind THEIRS=OURS, as in text=completion."),
    Row("a column to rename that is not there", "ppo", "--dataset queries.jsonl --columns question=prompt", "question"),
    Row("a split of a file", "ppo", "--dataset prompts.jsonl --eval_split test", "eval_split is 'test', but the file 'prompts.jsonl' has no splits: name a second file, or leave it out and eval_rows are held out."),
    Row("tokens for prompts", "ppo", "--dataset tokens.jsonl", "give the prompts themselves: they are tokenised here"),
    Row("fewer rows than are held out", "ppo", "--dataset few.jsonl", "give more rows or lower eval_rows."),
    Row("numbers for prompts", "ppo", "--dataset numbers.jsonl", "a prompt is a text, or a list of messages"),
    Row("messages without a role", "ppo", "--dataset roleless.jsonl", "a prompt is a text, or a list of messages"),
    Row("a prompt that leaves no room for its answer", "ppo", "--dataset long.jsonl", "may follow, but the model reads 128: shorten or drop the row, or lower max_completion_length."),
    Row("half a character in a cell", "ppo", "--dataset surrogate.csv --ptx_dataset surrogate.csv --ptx_coef 1", "cannot be read: line 2, column 'answer': half of a surrogate pair"),
    Row("half a character in a prompt", "ppo", "--dataset surrogate.jsonl", "cannot be read: line 1, column 'completion': half of a surrogate pair"),
    Row("pictures in a prompt", "ppo", "--dataset pictures.jsonl", "which is no text; a prompt is a text, or a list of messages"),
    Row("a dataset that nobody has", "ppo", "--dataset nobody/nothing", "nobody/nothing"),
    Row("no pairs for DPO", "dpo", "--dataset queries.jsonl", "queries.jsonl has the columns ['query'], which are no form of feedback"),
    Row("no pairs' file for DPO", "dpo", "--dataset missing.csv", "The feedback file 'missing.csv' does not exist."),
    Row("an answer of nothing", "dpo", "--dataset half_pairs.jsonl", "half_pairs.jsonl: line 1, column 'rejected': empty"),
    Row("an answer of nothing, for a reward model", "reward", "--dataset half_pairs.jsonl", "half_pairs.jsonl: line 1, column 'rejected': empty"),
    Row("an answer longer than the model reads", "dpo", "--dataset long_pairs.jsonl", "tokens with its prompt, but the model reads 128: shorten it or lower max_length."),
    Row("a strength that is a word", "dpo", "--dataset strong.jsonl", "strong.jsonl: line 1, column 'strength': 'very' is not a number."),
    Row("no feedback", "reward", "--dataset missing.csv", "The feedback file 'missing.csv' does not exist."),
    Row("no feedback for ratings", "reward", "--objective regression --dataset missing.csv", "The feedback file 'missing.csv' does not exist."),
    Row("prompts for feedback", "reward", "--objective regression --dataset prompts.jsonl", "prompts.jsonl"),
    Row("ratings that are words", "reward", "--objective regression --dataset words.jsonl", "line 1, column 'rating': 'good' is not a number"),
    Row("ratings that are all the same", "reward", "--objective regression --dataset constant.jsonl", "Every rating is 3: nothing can be learned from a constant."),
    Row("labels of one kind", "reward", "--objective binary --dataset one_label.jsonl", "Every label is 1: nothing can be learned from a constant."),
    Row("rankings that are ties", "reward", "--objective ranking --dataset ties.jsonl", "nothing can be learned from answers that are all alike."),
    Row("a ranking of one answer", "reward", "--objective ranking --dataset lonely.jsonl", "a ranking needs two completions or more, not 1"),
    Row("half a character", "reward", "--objective regression --dataset surrogate.jsonl", "half of a surrogate pair"),
    # Settings that say one thing twice
    Row("two lengths of a run", "ppo", "--max_steps 2 --total_episodes 64", "The command line says both total_episodes 64 and max_steps 2, which name one thing: leave one of them out."),
    Row("two who score", "ppo", "--reward_adapter demo --reward_funcs trl_ext.demo.rate", "The command line says both reward_funcs"),
    Row("nobody who scores", "ppo", "--dataset prompts.jsonl --max_completion_length 8", "Nothing gives a score: give --reward_adapter"),
    Row("two files of settings", "dpo", "--config broken.yaml --config list.yaml", "--config is given 2 times (broken.yaml, list.yaml): put the settings into one file."),
    Row("a new LoRA over an adapter", "ppo", "--model_name_or_path roles/policy --lora_r 8", "which is trained further as it is: leave lora_r out, or give"),
    Row("two policies to start from", "ppo", "--model_name_or_path roles/policy --policy_adapter roles/policy", "which is trained further as it is: leave policy_adapter out, or give"),
    Row("a reward adapter as model", "ppo", "--model_name_or_path roles/value --dataset prompts.jsonl --reward_adapter roles/value --max_completion_length 8", "The adapter in 'roles/value' has modules_to_save=['score']: roles share every full weight"),
    Row("a reward adapter as model for DPO", "dpo", "--model_name_or_path roles/value", "The adapter in 'roles/value' has modules_to_save=['score']: roles share every full weight"),
    Row("full training", "dpo", "--use_peft false", "use_peft is false, but the recipes train LoRA adapters over a frozen base: leave it out."),
    Row("a setting of yesterday", "ppo", "--response_length 53", "PPOConfig has no 'response_length': it is max_completion_length here."),
    # Reward functions
    Row("a module that is not there", "ppo", "--reward_funcs no_such_module.reward", "The reward function 'no_such_module.reward' cannot be imported"),
    Row("a yardstick that is not there", "ppo", "--yardstick trl_ext.demo.nothing", "'trl_ext.demo.nothing' cannot be imported"),
    Row("a yardstick that is no path", "ppo", "--yardstick exact", "yardstick is 'exact': pass a function"),
    Row("a yardstick that wants a column", "ppo", "--yardstick trl_ext.demo.rate", "yardstick rate asks for 'capital'"),
    Row("a function that is not there", "ppo", "--reward_funcs trl_ext.rewards.nothing", "The reward function 'trl_ext.rewards.nothing' cannot be imported"),
    Row("a number for a function", "ppo", "--reward_funcs bad_rewards.NUMBER", "callable"),
    Row("a function that raises", "ppo", "--reward_funcs bad_rewards.raises", "Reward function 'raises' raised ZeroDivisionError"),
    Row("too few scores", "ppo", "--reward_funcs bad_rewards.too_few", "Reward function 'too_few'"),
    Row("words for scores", "ppo", "--reward_funcs bad_rewards.words", "Reward function 'words'"),
    Row("NaN for a score", "ppo", "--reward_funcs bad_rewards.nan", "Reward function 'nan'"),
    Row("infinity for a score", "ppo", "--reward_funcs bad_rewards.infinite", "Reward function 'infinite'"),
    Row("no scores at all", "ppo", "--reward_funcs bad_rewards.nothing", "nothing"),
    # Models and adapters
    Row("a model that is not there", "ppo", "--model_name_or_path no/such_model", "no/such_model"),
    Row("an unknown precision", "ppo", "--dtype float33", "float33"),
    Row("4 and 8 bits", "ppo", "--load_in_4bit true --load_in_8bit true", "The command line says both load_in_4bit True and load_in_8bit True, which name one thing: leave one of them out."),
    Row("LoRA on layers that are not there", "ppo", "--lora_target_modules nowhere", "nowhere"),
    Row("a reward adapter that is not there", "ppo", "--reward_adapter missing", "missing"),
    Row("a reward adapter that is an empty folder", "ppo", "--reward_adapter empty", "empty"),
    Row("a policy's adapter as reward", "ppo", "--reward_adapter roles/policy", "roles/policy"),
    Row("a reward model of two labels", "ppo", "--reward_adapter two_labels", "two_labels"),
    Row("a policy adapter that is not there", "ppo", "--policy_adapter missing", "missing"),
    Row("a reward adapter as policy", "ppo", "--policy_adapter roles/value", "The adapter in 'roles/value' has modules_to_save=['score']: roles share every full weight"),
    Row("an unknown value role", "ppo", "--value adaptor", "adaptor"),
    Row("a reference that is not there", "ppo", "--reference_adapter missing", "missing"),
    # Folders
    Row("a file as output folder", "ppo", "--output_dir empty.jsonl", "output_dir 'empty.jsonl' is a file: give a folder."),
    Row("an output folder below a file", "dpo", "--output_dir empty.jsonl/out", "which is a file: choose another."),
    Row("an output folder with a run", "ppo", "--output_dir run", "output_dir 'run' holds a run already"),
    Row("the same for a reward model", "reward", "--output_dir run", "output_dir 'run' holds a run already"),
    Row("the same for DPO", "dpo", "--output_dir run", "output_dir 'run' holds a run already"),
    Row("no checkpoint to go on from", "ppo", "--resume_from_checkpoint true", "holds no checkpoint to go on from"),
    Row("a checkpoint that is none", "ppo", "--resume_from_checkpoint empty", "'empty' is no checkpoint"),
    # The circle
    Row("an unknown rater", "loop", "--rater nobody", "rater is 'nobody': give demo, page, file, reward:FOLDER or a function's dotted path."),
    Row("the demo's truth about other data", "loop", "--dataset prompts.jsonl", "rater 'demo' knows the truth about the embedded default only"),
    Row("a rater that cannot be imported", "loop", "--rater bad_rewards.nobody", "cannot be imported"),
    Row("a rater that is no adapter", "loop", "--rater reward:empty", "empty"),
    Row("an unknown way to judge", "loop", "--mode hearts", "mode is 'hearts': choose one of stars, pairs, ranking, labels."),
    Row("the disagreement of one reward model", "loop", "--pick disagreement", "set ensemble to 2 or more."),
    Row("pairs of one answer", "loop", "--mode pairs --per_prompt 1", "set per_prompt to 2 or more."),
    Row("no round", "loop", "--rounds 0", "rounds is 0: give at least 1."),
    Row("a misspelt setting of the reward model", "loop", '--reward {"epochs":3}', "reward has the setting 'epochs', which FeedbackRewardConfig does not have."),
    Row("settings of the reward model that are no JSON", "loop", "--reward {bad", "reward is '{bad', which is no JSON"),
    Row("comparisons that nobody makes", "loop", "--comparisons 10", "comparisons is 10, but only judge 'people' reads it: leave it out."),
    Row("a loop whose people compare nothing", "loop", "--judge people --comparisons 0", "comparisons is 0: give at least 1."),
    # The command
    Row("a run that is not there", "trl-ext", "doctor missing", "The run folder 'missing' does not exist."),
    Row("a folder without a run", "trl-ext", "doctor empty", "has no trainer_state.json"),
    Row("a loop's own folder", "trl-ext", "doctor loop", "but these folders in it have: round_1/ppo, round_1/reward/0. Give one of them."),
    Row("where to try nothing", "trl-ext", "doctor run --out trial", "--out and --logs say where and how long remedies are tried: give --try"),
    Row("trials in JSON of findings", "trl-ext", "doctor run --json --try", "--json prints findings alone, and --try writes trial.json"),
    Row("a report on nothing", "trl-ext", "report missing", "The run folder 'missing' does not exist."),
    Row("feedback that is not there", "trl-ext", "feedback check missing.csv", "The feedback file 'missing.csv' does not exist."),
    Row("feedback of an unknown kind", "trl-ext", "feedback check broken.yaml", "is of no known kind: give one of"),
    Row("a column that is not renamed", "trl-ext", "feedback check few.jsonl --column prompt", "is not of the kind THEIRS=OURS"),
    Row("half a record, strictly", "trl-ext", "feedback check broken.jsonl --strict", "line 1"),
]
# fmt: on


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def many(make: Callable[[int], dict[str, Any]], count: int = 100) -> str:
    return lines(*(make(i) for i in range(count)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every row runs in."""
    folder = tmp_path_factory.mktemp("here")
    texts = {
        "empty.jsonl": "",
        "broken.jsonl": "{not json\n",
        "broken.parquet": "PAR0",
        "list.jsonl": "[1, 2",
        "broken.yaml": "kl_coef: [1\n",
        "list.yaml": "- 1\n- 2\n",
        "prompts.jsonl": many(lambda i: {"prompt": f"a {i}"}),
        "queries.jsonl": many(lambda i: {"query": f"a {i}"}),
        "tokens.jsonl": many(lambda i: {"input_ids": [i]}),
        "few.jsonl": many(lambda i: {"prompt": f"a {i}"}, 3),
        "numbers.jsonl": many(lambda i: {"prompt": i}),
        "roleless.jsonl": many(lambda i: {"prompt": [{"content": f"a {i}"}]}),
        "words.jsonl": many(lambda i: {"prompt": f"p {i}", "completion": "a", "rating": "good"}),
        "strong.jsonl": many(lambda i: {"prompt": f"p {i}", "chosen": "a", "rejected": "b", "strength": "very"}),
        "half_pairs.jsonl": many(lambda i: {"prompt": f"p {i}", "chosen": "a", "rejected": ""}),
        "long_pairs.jsonl": many(lambda i: {"prompt": f"p {i}", "chosen": "a" * 2000, "rejected": "b"}),
        "long.jsonl": many(lambda i: {"prompt": "a" * 2000}),
        "pictures.jsonl": many(
            lambda i: {"prompt": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]}
        ),
        "constant.jsonl": many(lambda i: {"prompt": f"p {i // 2}", "completion": f"a {i}", "rating": 3}),
        "one_label.jsonl": many(lambda i: {"prompt": f"p {i // 2}", "completion": f"a {i}", "label": True}),
        "ties.jsonl": many(lambda i: {"prompt": f"p {i}", "completions": ["a", "b"], "ranks": [1, 1]}),
        "lonely.jsonl": many(lambda i: {"prompt": f"p {i}", "completions": ["a"], "ranks": [1]}),
        "surrogate.csv": 'prompt,answer\nhi,"[{""role"":""user"",""content"":""\\ud83d""}]"\n',
        "surrogate.jsonl": '{"prompt": "p", "completion": "\\ud83d", "rating": 1}\n' * 100,
        "bad_rewards.py": (
            "NUMBER = 3\n"
            "def raises(completions, **kwargs): return 1 / 0\n"
            "def too_few(completions, **kwargs): return [1.0]\n"
            "def words(completions, **kwargs): return ['good'] * len(completions)\n"
            "def nan(completions, **kwargs): return [float('nan')] * len(completions)\n"
            "def infinite(completions, **kwargs): return [float('inf')] * len(completions)\n"
            "def nothing(completions, **kwargs): return [None] * len(completions)\n"
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "empty").mkdir()
    for inside in ("round_1/ppo", "round_1/reward/0"):
        (folder / "loop" / inside).mkdir(parents=True)
        (folder / "loop" / inside / "trainer_state.json").write_text("{}")
    run = folder / "run"
    run.mkdir()
    (run / "adapter_model.safetensors").write_text("what a night of training gave")
    SharedBase.from_pretrained(demo.model_path(), policy=LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        folder / "roles"
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(demo.model_path(), num_labels=2)
    get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")).save_pretrained(
        folder / "two_labels"
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that was there before; what a row may add lies under out/."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)  # an empty one
    kept = (path for path in files if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.parts[-2] != "out"}


def said_by(row: Row) -> tuple[int | str | None, str]:
    """Run the row in the working folder: its status and, where it is a sentence, that sentence."""
    arguments = row.arguments.split()
    if row.entry == "trl-ext":
        return cli.main(arguments), ""
    script = ROOT / "recipes" / NAMES[row.entry]
    given = [] if "--output_dir" in arguments else ["--output_dir", "out"]
    sys.argv = [str(script), *arguments, *given, *FLAGS, "--disable_tqdm", "true"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code, stop.code if isinstance(stop.code, str) else ""
    return 0, ""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.entry}: {row.what}")
def test_wrong_input_gets_its_sentence(
    row: Row, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", [])
    before = contents(files)
    status, sentence = said_by(row)
    errors = capsys.readouterr().err
    said = sentence or errors
    assert status not in (0, None)
    assert row.says in said, said
    assert "Traceback" not in said and "Traceback" not in errors
    if sentence:
        assert "\n" not in sentence and sentence.startswith(f"{NAMES[row.entry]}: error: ")
    assert contents(files) == before, "something was written over"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def page() -> str:
    """docs/errors.md."""
    parts = [
        "# Wrong input\n\n"
        "What is wrong is said in one sentence, with status 1 (2 for the command line itself), before anything expensive\n"
        "happens; nothing that lies in a folder is written over. `TRL_EXT_TRACEBACK=1` shows where it was noticed. Every row is\n"
        "tried by a test: `tests/recipes/test_bad_input.py`, `test_bad_environments.py` and `test_bad_calls.py`.\n",
        "## On the command line\n",
        table("what is wrong", "given", *((row.what, given(row), row.says) for row in ROWS)),
        "## Around it\n",
        table("what is missing or wrong", "given", *((row.what, given(row), row.says) for row in ENVIRONMENTS)),
        "## In Python\n\n"
        "What is not in question is as it should be: `model`, `base`, `args`, `prompts`, `judge`, `ids`, `mask`.\n",
        table("what is wrong", "called", *((row.what, row.code, f"{row.error}: {row.says}") for row in CALLS)),
    ]
    return "\n".join(parts)


def given(row: Row | Environment) -> str:
    variables = getattr(row, "variables", {})
    return " ".join(
        [*(f"{name}={value}" for name, value in variables.items()), NAMES[row.entry], row.arguments]
    ).strip()


def table(first: str, second: str, *rows: tuple[str, str, str]) -> str:
    head = f"| {first} | {second} | said, among other words |\n|---|---|---|\n"
    return head + "".join(f"| {what} | `{code}` | {said.replace('|', chr(92) + '|')} |\n" for what, code, said in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
