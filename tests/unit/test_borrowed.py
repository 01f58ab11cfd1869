"""What we borrow: the private names of other libraries that the package overrides, calls or reads. (A name that is also
one of ours is not seen where it is read from somebody else's object.)

Nobody promises these. Each is listed here with its parameters, so that a release that changes one fails here, by name.
CI runs this file at both ends of the range of TRL.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trl_ext

ROOT = Path(trl_ext.__file__).parent
TRAINER, TRL_BASE = "transformers.trainer.Trainer", "trl.trainer.base_trainer._BaseTrainer"
REWARD_TRAINER = "trl.trainer.reward_trainer.RewardTrainer"
TUNER_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
CLASS, VALUE = "a class", "a value"  # what has no signature

# What a class of ours puts its own in the place of. A parameter with a default ends in "=".
OVERRIDDEN: dict[tuple[str, str], str] = {
    (TRAINER, "_clip_grad_norm"): "self, model",
    (TRAINER, "_get_grad_norm"): "self, model, grad_norm=",
    (TRAINER, "_get_output_dir"): "self, trial",
    (TRAINER, "_get_train_sampler"): "self, train_dataset=",
    (TRAINER, "_load_best_model"): "self",
    (TRAINER, "_load_from_checkpoint"): "self, resume_from_checkpoint, model=",
    (TRAINER, "_load_optimizer_and_scheduler"): "self, checkpoint",
    (TRAINER, "_push_from_checkpoint"): "self, checkpoint_folder",
    (TRAINER, "_run_epoch"): "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    (TRAINER, "_save"): "self, output_dir=, state_dict=",
    (TRAINER, "_save_checkpoint"): "self, model, trial",
    (TRAINER, "_save_optimizer_and_scheduler"): "self, output_dir",
    (TRAINER, "_set_signature_columns_if_needed"): "self",
    ("transformers.training_args.TrainingArguments", "_VALID_DICT_FIELDS"): VALUE,
    (TRL_BASE, "_send_telemetry"): "self",
    (REWARD_TRAINER, "_prepare_dataset"): "self, dataset, processing_class, args, dataset_name",
}
# What the package calls, reads or writes to.
USED: dict[tuple[str, str], str] = {
    (TRAINER, "_get_dataloader"): "self, dataset, description, batch_size, sampler_fn=, is_training=, dataloader_key=",
    (REWARD_TRAINER, "_metrics"): VALUE,
    ("trl.trainer.base_config", "_BaseConfig"): CLASS,
    ("trl.trainer.base_trainer", "_BaseTrainer"): CLASS,
    ("accelerate.state.GradientState", "_set_sync_gradients"): "self, sync_gradients",
    (TUNER_LAYER, "_active_adapter"): VALUE,
    (TUNER_LAYER, "_disable_adapters"): VALUE,
    ("torch.Tensor", "_is_view"): VALUE,
    ("torch.cpu", "_is_avx512_bf16_supported"): "",
    ("transformers.modeling_utils.PreTrainedModel", "_is_stateful"): VALUE,
    ("torch.nn.modules.dropout", "_DropoutNd"): CLASS,
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in ROOT.rglob("*.py"):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def own_names() -> set[str]:
    """Every name that the package defines or assigns, as a variable, a function or an attribute of `self`."""
    names: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return names


def used_names() -> set[str]:
    """Private names that the package reads, writes or imports and that are not its own."""
    own, names = own_names(), set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                names.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("trl_ext"):
                names |= {alias.name for alias in node.names if private(alias.name)}
    return names


def overridden_names() -> set[tuple[str, str]]:
    """(class of theirs, private name) of what our classes define in its place."""
    names = set()
    for module in pkgutil.walk_packages(trl_ext.__path__, "trl_ext."):
        for cls in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != module.name:
                continue
            for name in filter(private, vars(cls)):
                for base in cls.__mro__[1:]:
                    theirs = not base.__module__.startswith(("trl_ext", "typing", "torch.autograd"))
                    if theirs and name in vars(base):
                        names.add((f"{base.__module__}.{base.__qualname__}", name))
                        break
    return names


def signature_of(owner: str, name: str) -> str:
    """The parameters of a borrowed function; `CLASS` or `VALUE` where there are none.

    Raises:
        AttributeError, ImportError: it is gone.
    """
    module, _, cls = owner.rpartition(".")
    place: Any = importlib.import_module(owner) if owner.islower() else getattr(importlib.import_module(module), cls)
    if inspect.isclass(place) and name in getattr(place, "__annotations__", {}) and not hasattr(place, name):
        return VALUE
    if not hasattr(place, name) and f"self.{name} = " in inspect.getsource(place):
        return VALUE
    value = inspect.getattr_static(place, name)
    if inspect.isclass(value):
        return CLASS
    return parameters_of(value) if inspect.isfunction(value) else VALUE


def parameters_of(function: Any) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(f"{stars.get(p.kind, '')}{p.name}{'' if p.default is p.empty else '='}" for p in parameters)


def test_every_override_is_listed() -> None:
    assert overridden_names() == set(OVERRIDDEN)


def test_everything_that_is_used_is_listed() -> None:
    assert used_names() == {name for _, name in USED}


@pytest.mark.parametrize(("owner", "name"), [*OVERRIDDEN, *USED], ids=lambda part: part.rpartition(".")[2])
def test_it_is_there_and_looks_the_same(owner: str, name: str) -> None:
    assert signature_of(owner, name) == (OVERRIDDEN | USED)[owner, name]


def test_the_scan_sees_what_is_new() -> None:
    """A class that overrides one more method of the Trainer's would be noticed."""
    names = {name for name, member in vars(trl_ext.PPOTrainer).items() if private(name)}
    assert "_save_checkpoint" in names and "_saved_on_failure" in names
    assert (TRAINER, "_save_checkpoint") in overridden_names()
    assert not any(name == "_saved_on_failure" for _, name in overridden_names()), "ours alone"
