"""PPO on today's TRL: policy, reference, value and reward model are four roles over one base."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from trl_ext import hub, runs
from trl_ext._trl import BaseTrainer
from trl_ext.callbacks import PPOControl, RolloutCallback, RolloutEvents, check_events
from trl_ext.callbacks.progress import show_in_notebook
from trl_ext.callbacks.rollout import share_switches
from trl_ext.diagnostics import Report, RunLog
from trl_ext.feedback.files import as_dataset
from trl_ext.generation import Generator
from trl_ext.ppo import checks
from trl_ext.ppo.batches import RolloutSampler
from trl_ext.ppo.building import (
    build_base,
    build_generator,
    build_scorer,
    check_args,
    check_generator,
    check_model,
    check_peft_config,
    default_config,
    keep_outputs_precise,
    tokenizers_of,
    warn_of_outliers,
    warn_of_turns,
    without_dropout,
)
from trl_ext.ppo.checkpoints import Checkpoints, WholeOptimizer
from trl_ext.ppo.collector import Collector
from trl_ext.ppo.completions import completions_table, print_completions, save_completions, track_completions
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.evidence import held_out_gap
from trl_ext.ppo.exchange import EXCHANGES
from trl_ext.ppo.experience import make_experience
from trl_ext.ppo.failures import on_all, together
from trl_ext.ppo.interrupts import Interrupts
from trl_ext.ppo.metrics import Metrics, peak_memory
from trl_ext.ppo.pretraining import PretrainMix
from trl_ext.ppo.stream import PromptStream, rows_to_evaluate
from trl_ext.ppo.summary import summarize
from trl_ext.ppo.update import Updater
from trl_ext.ppo.yesterday import ARGUMENTS, explained
from trl_ext.rewards import RewardFunction
from trl_ext.tokens import vocabulary_size
from trl_ext.types import Experience


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collator: dataset rows stay dicts; prompts are tokenised when they are answered."""
    return rows


class _AfterStep(TrainerCallback):
    """Tells the trainer that the optimizer has stepped."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        self._after_step = after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each optimizer step, taken or skipped."""
        self._after_step()


class PPOTrainer(hub.WritesCard, BaseTrainer):
    """Proximal policy optimisation with LoRA adapters over one shared base.

    Transformers' Trainer keeps the loop; `trl_ext.ppo.update` is what happens in it, and says who calls whom.

    Args:
        model: a model's name or folder, a PreTrainedModel, an adapter's name or folder or a PeftModel (the adapter is
            trained, a frozen copy of it is the reference), or a `SharedBase`.
        reward_funcs: one or several reward functions as TRL calls them (see `trl_ext.rewards`), sequence-classification
            models, or names of such; None: the base's reward role.
        args: the settings; None: `PPOConfig` with an output folder named after the model.
        train_dataset: prompts in a `prompt` column, texts or conversations, of a Dataset, a DataFrame, a list of
            rows, a file, a saved folder or a name on the Hub, or several of these; the reward functions get further
            columns. Of an IterableDataset rows are read as they are needed, in its own order.
        eval_dataset: the same, or a dict of such; an IterableDataset is read to its end first.
        processing_class: the tokenizer; None: the model's.
        reward_processing_classes: tokenizers of the models among `reward_funcs`; None: the models' own.
        callbacks: TrainerCallbacks; `RolloutCallback`s hear PPO's own events.
        optimizers: optimizer and learning rate schedule; None: AdamW and what `args` says.
        quantization_config: `transformers.BitsAndBytesConfig`, where `model` is a name.
        peft_config: LoraConfig of a new policy; None: LoRA of rank 16 on every linear layer.
        ptx_dataset: texts (column `text`) for the pretraining term of the loss, where `ptx_coef` is set.
        generator: who answers: anything with `answers(prompt_ids, config, role)`, and with `begin` where `args` has
            rollouts_ahead, see `trl_ext.generation`; None: the base itself, or what `args` says.

    Raises:
        ValueError, TypeError: bad input, found before a model is loaded where that is possible.
    """

    is_fsdp_enabled: bool  # Transformers'
    optimizer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a loss that nothing would call.

        Raises:
            TypeError: the subclass overrides `compute_loss`.
        """
        super().__init_subclass__(**kwargs)
        if cls.compute_loss is not PPOTrainer.compute_loss:
            raise TypeError(
                f"{cls.__name__} overrides compute_loss, which PPO never calls, for each role has a loss of its own: "
                "give PPOConfig an objective, a trl_ext.ppo.Objective with your own terms, instead."
            )

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        ptx_dataset: Dataset | None = None,
        generator: Generator | None = None,
    ) -> None:
        check_model(model, peft_config, quantization_config)
        check_args(args)
        args = args if args is not None else default_config(model)
        check_peft_config(model, peft_config, args)
        check_generator(generator, args)
        for callback in callbacks or []:
            check_events(callback)
        checks.check_output_dir(str(args.output_dir))
        self._claim = runs.claimed_by(args)
        checks.check_devices(args)
        hub.check_push(args)
        functions = checks.as_list(reward_funcs)
        checks.check_scores(functions, reward_processing_classes, model, args)
        reward_tokenizers = tokenizers_of(functions, reward_processing_classes, args)
        train_dataset = as_dataset(train_dataset, "train_dataset")
        eval_dataset = as_dataset(eval_dataset, "eval_dataset", several=True)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = PromptStream(train_dataset, args)
        eval_dataset = rows_to_evaluate(eval_dataset)
        tokenizer = checks.check_run(
            *(args, train_dataset, eval_dataset, processing_class, functions, model, ptx_dataset, generator),
            reward_tokenizers=reward_tokenizers,
        )
        mix = (
            PretrainMix(ptx_dataset, tokenizer, args.ptx_max_length, args.order_seed)
            if ptx_dataset is not None
            else None
        )

        set_seed(args.seed)  # LoRA draws its weights
        self.base = build_base(model, args, quantization_config, peft_config)
        warn_of_outliers(self.base)
        if args.disable_dropout:
            without_dropout(self.base)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each role's backward touches its own adapter alone
        if args.ddp_broadcast_buffers is None:
            # A frozen base changes no buffers, and a forward that waits would wait for ever for a process that failed.
            args.ddp_broadcast_buffers = False
        if args.steps_of_run is not None:
            args.max_steps = args.steps_of_run

        super().__init__(
            model=self.base,
            args=args,
            data_collator=_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        keep_outputs_precise(self.base, self.accelerator)
        show_in_notebook(self)
        self.control = PPOControl()
        self.interrupts = Interrupts()
        events = self.events = RolloutEvents(self, together, vocabulary_size(self.base.config))
        generator = generator if generator is not None else build_generator(self.base, args, self.accelerator)
        scorer = build_scorer(functions, reward_tokenizers, args, self.accelerator.device)
        self._shown: Experience | None = None  # the rollout whose completions were printed and saved
        self.collector = Collector(self.base, tokenizer, generator, scorer, args, self.accelerator, events)
        example = train_dataset.example if isinstance(train_dataset, PromptStream) else train_dataset[0]
        ends: Any = self.collector.generation_config.eos_token_id
        warn_of_turns(tokenizer, example["prompt"], ends, args.chat_template_kwargs)
        self.updater = Updater(self.base, args, self.accelerator, self.collector, events, mix)
        self.checkpoints = Checkpoints(args, self.updater, self.accelerator)
        self.add_callback(_AfterStep(self._after_step))
        self._postponed: Exception | None = None
        self._grad_norm: Any = torch.zeros(())
        self._tell = self.callback_handler.call_event
        self.callback_handler.call_event = self._call_event
        self._sampler: RolloutSampler | None = None
        set_seed(args.seed, device_specific=True)  # processes sample different completions

    @property
    def experience(self) -> Experience | None:
        """The rollout in use; None before the first."""
        return self.updater.experience

    @property
    def metrics(self) -> Metrics:
        """What is logged next."""
        return self.updater.metrics

    def add_callback(self, callback: Any) -> None:
        """As Transformers' `Trainer.add_callback`.

        Raises:
            TypeError: a method for one of PPO's events asks for what it does not come with.
        """
        callback = callback() if isinstance(callback, type) else callback
        check_events(callback)
        super().add_callback(callback)

    def exchange(self, part: str) -> bool:
        """Put what is known to be good in a part's place, before training, to see whether the part is to blame.

        Args:
            part: "reward_funcs" (the doctor's yardstick scores), "train_dataset" (the held-out prompts), "generator"
                (Transformers' `generate`) or "processing_class" (the tokenizer beside the model's weights).

        Returns:
            Whether there is such a thing here; if not, nothing changed.
        """
        return EXCHANGES[part](self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' `Trainer.train`. Ctrl-C and SIGTERM take effect after the optimizer step under way, with a
        checkpoint written. Whatever fails after the first step (a generator, a reward function, a callback, a tracker)
        raises after a checkpoint is written."""
        self.updater.reset()
        self.checkpoints.forget_step_end()
        self._postponed = None
        self._shown = None
        # A step is closed before anybody hears of it, and trackers come after the callbacks that add to a log.
        self.callback_handler.callbacks.sort(
            key=lambda callback: (not isinstance(callback, _AfterStep), not isinstance(callback, RolloutCallback))
        )
        try:
            with self.interrupts, self._saved_on_failure(whole_run=True):
                output = super().train(*args, **kwargs)
        except Exception:  # but not a second Ctrl-C, which stops at once
            self.updater.collector.drop_ahead()
            raise
        self.updater.collector.drop_ahead()
        self.interrupts.came()
        self.interrupts.raise_received()
        return output

    def _call_event(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' `CallbackHandler.call_event`. What a callback raises on one process, all raise. Once the
        optimizer has stepped, it waits for the end of the step, where the run can be saved; and where a script may call
        the event on one process alone, for the next event that all of them come to."""

        def tell() -> Any:
            control = self._tell(event, *args, **kwargs)
            self._raise_postponed()
            return control

        if event == "on_train_begin":
            self.updater.begin()
        perhaps_alone = self.accelerator.num_processes > 1 and event in ("on_log", "on_push_begin")
        if event != "on_optimizer_step" and not perhaps_alone:
            control = on_all(tell)
            share_switches(control)
        else:
            try:
                control = self._tell(event, *args, **kwargs)
            except Exception as error:
                self._postponed, control = error, self.control
        if event == "on_train_begin":
            self._first_step = self.state.global_step  # above 0 where a run goes on
        elif event == "on_pre_optimizer_step":
            self.checkpoints.note_stepping()
        return control

    def _raise_postponed(self) -> None:
        error, self._postponed = self._postponed, None
        if error is not None:
            raise error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing if the interrupted run had already finished: Transformers would take one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._sampler is not None:  # where several processes resume, nobody else reaches it
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    # One update -------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """Train on one micro-batch of the rollout in use, first making a new rollout where that one is used up.

        Returns:
            This micro-batch's share of the minibatch's loss, times the number of processes.
        """
        updater, step = self.updater, self.state.global_step
        updater.begin_step(step)
        if updater.needs_rollout:
            with self._saved_on_failure():
                self._normalize_scores()
                updater.collect(inputs, self.state, self.control, self._following())
        with self.collector.timed("train"), self._saved_on_failure():
            loss = updater.train_on_next(model, step)
            may_step = not updater.idle or updater.finish_minibatch()
        if not may_step:
            # Accelerate's optimizer steps only where gradients are synchronised: weights and moments stay as they are.
            self.accelerator.gradient_state._set_sync_gradients(False)
        if self.args.torch_empty_cache_steps is not None and step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        return loss

    def _following(self) -> list[Any] | None:
        """This process's prompts of the rollout after the one to come; None where it is not begun ahead, or there is
        none."""
        number, args = self.updater.position.rollout + 1, self.args
        if not args.rollouts_ahead or number * args.steps_per_rollout >= self.state.max_steps:
            return None
        assert self._sampler is not None
        share = torch.tensor(self._sampler.rollout(number)).chunk(args.world_size)[args.process_index].tolist()
        return on_all(lambda: [self._prompts[row]["prompt"] for row in share])

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Not used: each role has a loss of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("PPOTrainer has no single loss: see trl_ext.ppo.objectives for those of its roles.")

    def _after_step(self) -> None:
        """Close the step, and the epoch and the update that end with it; take in a signal."""
        self.checkpoints.note_step_end()
        share_switches(self.control)  # of on_optimizer_step
        with self._saved_on_failure():
            self.updater.note_rounding(getattr(self.optimizer, "optimizer", self.optimizer))
            self.updater.end_step(self.state, self.control)
            on_all(self._raise_postponed)
        if self.interrupts.came():
            self.control.should_save = self.control.should_training_stop = True

    def _normalize_scores(self) -> None:
        if self.collector.combination.needs_reference and self.train_dataset is not None:
            rows = self.train_dataset
            if isinstance(rows, PromptStream):
                rows = on_all(lambda: rows.first(self.args.normalization_samples))
            self.collector.normalize_by_reference(rows, self.state)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self._is_stepping else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Of a step that is left out, that of the one before: its own gradients stay as they are, fp16's scale too."""
        if self._is_stepping:
            self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    @property
    def _is_stepping(self) -> bool:
        return bool(self.accelerator.gradient_state.sync_gradients)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _saved_on_failure(self, whole_run: bool = False) -> AbstractContextManager[None]:
        def save() -> None:
            self.updater.undo_step()
            weights_alone, self.args.save_only_model = self.args.save_only_model, False  # to go on from
            try:
                self._write_checkpoint()
            finally:
                self.args.save_only_model = weights_alone

        return self.checkpoints.saved_first(lambda: self.state.global_step, save, whole_run)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The roles instead of the model."""
        if self.args.should_save or self.base.sharded:  # all processes have a part of the weights
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            self.checkpoints.save_model(folder, self.processing_class)
        if self.args.should_save:
            self.save_card(folder)

    def card_facts(self) -> tuple[str, RunLog, str, list[str]]:
        """See `hub.WritesCard`."""
        settings = {**self.args.to_dict(), "rollout_batch_size": self.args.rollout_batch_size}
        log = RunLog.of(self.state.log_history, settings)
        return "ppo", log, self.base.config.name_or_path, hub.loaded_from(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Transformers', whole or not at all."""
        on_all(self.create_model_card)
        self._write_checkpoint(trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(self.checkpoints.folder_of(self.state.global_step)))

    def _write_checkpoint(self, trial: Any = None) -> None:
        with self.checkpoints.written(self.state):
            super()._save_checkpoint(self.model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Transformers'. A script may call it on one process alone, or `push_to_hub`, which calls it, unless FSDP2
        shares out the base; for a checkpoint it is called on all."""
        save = partial(super().save_model, output_dir, _internal_call)
        with self._as_if_whole():
            self.checkpoints.met(save) if self.checkpoints.unfinished is not None else save()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_if_whole(optimizer_too=True):
            super()._save_optimizer_and_scheduler(output_dir)
        self.checkpoints.save_state(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_if_whole(optimizer_too=True):
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _as_if_whole(self, optimizer_too: bool = False) -> Iterator[None]:
        """Inside, Transformers writes and reads what it does where nothing is shared out: the roles alone, not all of
        the base, and an optimizer's state that any number of processes can go on from."""
        enabled, optimizer = self.is_fsdp_enabled, self.optimizer
        self.is_fsdp_enabled = False
        if enabled and optimizer_too:
            self.optimizer = WholeOptimizer(optimizer)
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.optimizer = enabled, optimizer

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.unfinished or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not while a checkpoint is written: it would be uploaded from a place that it leaves. Transformers takes the
        policy from the checkpoint; the roles beside it are saved first."""
        if self.checkpoints.unfinished is None:
            on_all(lambda: self._push(checkpoint_folder))

    def _push(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            self._save()
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        self.checkpoints.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.checkpoints.load_best(Path(str(self.state.best_model_checkpoint)))
        self.checkpoints.forget_step_end()

    def _send_telemetry(self) -> None:
        """Nothing: TRL's trainers report each run to the Hub."""

    # Data -------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one rollout's prompts, each repeated for every micro-batch trained on it."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.rollout_batch_size // self.args.world_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RolloutSampler:
        args = self.args
        repeats = args.steps_per_rollout * args.gradient_accumulation_steps
        rows = self._prompts = dataset if dataset is not None else self.train_dataset
        shuffle = args.shuffle_dataset and not isinstance(rows, PromptStream)
        self._sampler = RolloutSampler(
            len(rows), args.rollout_batch_size, repeats, shuffle, args.order_seed, args.num_generations
        )
        return self._sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers': rows that one process cannot read end the run on all."""
        return on_all(lambda: super(PPOTrainer, self).get_batch_samples(*args, **kwargs))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    # Looking ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rollout's and the update's metrics to a training log; print and keep sample completions."""
        if "loss" in logs:
            logs |= self.metrics.drain()
            episodes = self.state.global_step / self.args.steps_per_rollout * self.args.rollout_batch_size
            logs["episode"] = episodes
            if start_time is not None:
                done = episodes * (1 - self._first_step / max(self.state.global_step, 1))
                logs["eps"] = done / (time.time() - start_time)
            logs |= {f"time/{phase}": seconds for phase, seconds in self.collector.seconds.items()}
            logs["memory/peak_gib"] = peak_memory(self.accelerator.device) / 2**30
            self.collector.seconds.clear()
        super().log(logs, start_time)
        if "loss" in logs and self.is_in_train:  # a script may log on one process alone
            # The completions once a rollout, though its steps may be logged one by one.
            shown = self.args.log_completions and self.experience is not self._shown
            self._shown = self.experience
            extra = gather_object([dict(self.collector.log.columns)]) if shown else None
            on_all(lambda: self._after_log(extra))
            share_switches(self.control)  # of on_log

    def _after_log(self, extra: list[dict[str, list[Any]]] | None) -> None:
        self._raise_postponed()
        if extra is not None and self.experience is not None and self.is_world_process_zero():
            step = self.state.global_step
            table = completions_table(self.experience, self.collector.score_names, step, extra)
            save_completions(table, str(self.args.output_dir), step)
            track_completions(table, self.args.report_to or ())
            print_completions(table, self.args.num_completions_to_print, f"Step {step}")

    def report(self) -> Report:
        """The report of the run so far, which a notebook shows where this is a cell's last line."""
        self.save_state()
        return Report(str(self.args.output_dir))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer every prompt once, always with the same random numbers, and report the rollout's metrics."""
        with self._saved_on_failure():
            self._normalize_scores()
            scored, logged = self.collector.all_of(dataloader, self.state)
            experience = together(lambda: make_experience(scored, self.args))
            metrics = together(lambda: summarize(experience, self.args, self.collector.score_names)) | logged
            if self.args.evidence:
                metrics |= held_out_gap(self.experience, experience) | self.updater.held_out_evidence(experience)
            metrics["completions/eos_rate"] = 1.0 - metrics["completions/clipped_ratio"]
            self.events.on_evaluation_end(experience, metrics)
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=prefixed, num_samples=len(experience.kl))


PPOTrainer.__init__ = explained(PPOTrainer.__init__, "PPOTrainer", ARGUMENTS)  # type: ignore[method-assign]
