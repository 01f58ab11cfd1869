"""What the recipes share. A process that imports this sends no telemetry: TRL's trainers report each run to the Hub."""

import sys
import warnings

from huggingface_hub import constants

from trl_ext.launch.data import (
    DataArguments,
    check_written,
    load_feedback,
    load_pairs,
    load_prompts,
    load_rows,
    load_texts,
)
from trl_ext.launch.ensembles import RewardArguments, held_out_loss, members, show_members, unfinished
from trl_ext.launch.judging import reference_scores, scored_answers
from trl_ext.launch.progress import show_progress
from trl_ext.launch.screen import (
    answers,
    before_and_after,
    distinct_prompts,
    kl_to_reference,
    megabytes,
    report,
    show,
    show_before_after,
    show_scored_pairs,
)
from trl_ext.launch.settings import (
    DPOConfig,
    described,
    free_memory,
    import_functions,
    load_shared_base,
    match_precision,
    model_for_trl,
    named_model,
    parse,
    reward_folder,
    user_errors,
)
from trl_ext.ppo.checks import check_run
from trl_ext.reward_models.trainer import tell_left_out

constants.HF_HUB_DISABLE_TELEMETRY = True  # the environment variable is read earlier, when Transformers is imported
if not sys.warnoptions:  # TRL's and PEFT's words about a name that both still use
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)

__all__ = [
    "DPOConfig",
    "DataArguments",
    "RewardArguments",
    "answers",
    "before_and_after",
    "check_run",
    "check_written",
    "described",
    "distinct_prompts",
    "free_memory",
    "held_out_loss",
    "import_functions",
    "kl_to_reference",
    "load_feedback",
    "load_pairs",
    "load_prompts",
    "load_rows",
    "load_shared_base",
    "load_texts",
    "match_precision",
    "megabytes",
    "members",
    "model_for_trl",
    "named_model",
    "parse",
    "reference_scores",
    "report",
    "reward_folder",
    "scored_answers",
    "show",
    "show_before_after",
    "show_members",
    "show_progress",
    "show_scored_pairs",
    "tell_left_out",
    "unfinished",
    "user_errors",
]
