"""PPO on today's TRL: policy, reference, value and reward model are four roles over one base."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from trl_ext._trl import BaseTrainer
from trl_ext.callbacks import PPOControl, RolloutCallback, RolloutEvents
from trl_ext.rewards import RewardFunction
from trl_ext.trainers import checks
from trl_ext.trainers.batching import RolloutSampler
from trl_ext.trainers.building import build_base, build_scorer, check_model, default_config, without_dropout
from trl_ext.trainers.collector import Collector
from trl_ext.trainers.completions import completions_frame, print_completions, save_completions
from trl_ext.trainers.experience import estimate, make_experience, shape
from trl_ext.trainers.failing import SharedEvents
from trl_ext.trainers.interrupts import Interrupts
from trl_ext.trainers.metrics import Metrics, peak_memory
from trl_ext.trainers.ppo_config import PPOConfig
from trl_ext.trainers.pretraining import PretrainMix
from trl_ext.trainers.saving import Checkpoints
from trl_ext.trainers.summary import summarize
from trl_ext.trainers.updater import Updater
from trl_ext.types import Experience


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collator: dataset rows stay dicts; they are tokenised when they are answered."""
    return rows


class _AfterStep(TrainerCallback):
    """Tells the trainer that the optimizer has stepped."""

    def __init__(self, after_step: Any) -> None:
        self._after_step = after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each optimizer step, taken or passed over."""
        self._after_step()


class PPOTrainer(Checkpoints, BaseTrainer):
    """Proximal policy optimisation with LoRA adapters over one shared base.

    Args:
        model: a model's name or folder, a PreTrainedModel, a PeftModel (its adapter is trained, a frozen copy of it is
            the reference), or a `SharedBase`.
        reward_funcs: one or several reward functions as TRL calls them (see `trl_ext.rewards`), sequence-classification
            models, or names of such; None: the base's reward role.
        args: the settings; None: `PPOConfig` with an output folder named after the model.
        train_dataset: prompts in a `prompt` column, texts or conversations; the reward functions get further columns.
        eval_dataset: the same, or a dict of such.
        processing_class: the tokenizer; None: the model's.
        reward_processing_classes: tokenizers of the models among `reward_funcs`; None: the models' own.
        callbacks: TrainerCallbacks.
        optimizers: optimizer and learning rate schedule; None: AdamW and what `args` says.
        quantization_config: `transformers.BitsAndBytesConfig`, where `model` is a name.
        peft_config: LoraConfig of the policy; None: LoRA of rank 16 on every linear layer.
        ptx_dataset: texts (column `text`) for the pretraining term of the loss, where `ptx_coef` is set.

    Raises:
        ValueError, TypeError: bad input, found before a model is loaded where that is possible.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ppo", "trl_ext"]
    _name = "PPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Fine-Tuning Language Models from Human Preferences",
        "id": "1909.08593",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        check_model(model, peft_config, quantization_config)
        args = args if args is not None else default_config(model)
        checks.check_output_dir(str(args.output_dir))
        checks.check_devices(args)
        checks.check_datasets(train_dataset, eval_dataset, args)
        functions = checks.as_list(reward_funcs)
        checks.check_scores(functions, model, args)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        tokenizer = checks.check_tokenizer(processing_class, train_dataset)
        checks.check_texts(ptx_dataset, args)
        mix = PretrainMix(ptx_dataset, tokenizer, args.ptx_max_length, args.seed) if ptx_dataset is not None else None

        set_seed(args.seed)  # LoRA draws its weights
        self.base = build_base(model, args, quantization_config, peft_config)
        if args.disable_dropout:
            without_dropout(self.base)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each role's backward touches its own adapter alone
        if args.total_episodes is not None:
            args.max_steps = -(-args.total_episodes // args.rollout_batch_size) * args.steps_per_rollout

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
        scorer = build_scorer(functions, reward_processing_classes, args, self.accelerator.device)
        self.control = PPOControl()
        self.add_callback(_AfterStep(self._after_step))
        events = RolloutEvents(self)
        self.events = SharedEvents(events)
        self.metrics = Metrics()
        self.collector = Collector(self.base, tokenizer, scorer, args, self.accelerator, events)
        self.updater = Updater(self, mix)
        self.experience: Experience | None = None
        self.rollout_metrics: dict[str, float] = {}
        self.interrupts = Interrupts()
        self._sampler: RolloutSampler | None = None
        set_seed(args.seed, device_specific=True)  # processes sample different answers

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' `Trainer.train`. Ctrl-C and SIGTERM take effect after the optimizer step under way, with a
        checkpoint written; so does a reward function that fails."""
        self.updater.reset()
        self._step_end = None
        # Trackers come after the callbacks that add to a log.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, RolloutCallback))
        with self.interrupts:
            output = super().train(*args, **kwargs)
        self.interrupts.raise_received()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where an interrupted run had come to its end: Transformers would take one step more."""
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
        step = self.state.global_step % self.args.steps_per_rollout
        if self.updater.idle and (step == 0 or self.experience is None):
            self.experience = self.collect(inputs)
        assert self.experience is not None
        started = time.perf_counter()
        loss = self.updater(model, self.experience)
        # Transformers' own sum of losses since the last log is lost with an interrupted run.
        self.metrics.add_value("loss", loss * self.args.gradient_accumulation_steps)
        if self.updater.idle and not self.updater.finish_minibatch():
            # Accelerate's optimizer steps only where gradients are synchronised: weights and moments stay as they are.
            self.accelerator.gradient_state._set_sync_gradients(False)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)  # or the clock stops while backward waits to begin
        self.collector.seconds["train"] += time.perf_counter() - started
        return loss

    def collect(self, inputs: list[dict[str, Any]]) -> Experience:
        """Answer this process's prompts and turn all processes' answers into experience."""
        self.control.should_update_stop = False
        if self.collector.combination.needs_reference:
            self.collector.normalize_by_reference(self.train_dataset, self.state)
        with self._saved_on_failure():
            judged = self.events.replace("on_scores", self.collector(inputs, self.state))
            shaped = self.events.replace("on_rewards", shape(judged, self.args))
            experience = self.events.replace("on_advantages", estimate(shaped, self.args))
        self.metrics.take_in(self.collector.reports.metrics)
        self.rollout_metrics = summarize(experience, self.args, self.collector.score_names)
        self.metrics.add_rollout(self.rollout_metrics)
        self.state.num_input_tokens_seen += int(experience.rollout.attention_mask.sum())
        self.updater.begin_rollout(stopped=self.control.should_update_stop)
        return experience

    def _after_step(self) -> None:
        """Tell the callbacks of passes and updates that have ended."""
        assert self.experience is not None
        self._note_step_end()
        args, step = self.args, (self.state.global_step - 1) % self.args.steps_per_rollout
        epoch, minibatch = divmod(step, args.num_mini_batches)
        progress, stats, ended = self.updater.progress, None, step == args.steps_per_rollout - 1
        if minibatch == args.num_mini_batches - 1 and progress.sums:
            self.metrics.add_value("policy/skipped_minibatches", progress.skipped)
            stats = self.updater.end_epoch(epoch)
        if ended:
            if args.objective == "kl_penalty":
                self.metrics.add_value("policy/penalty_coef", self.updater.penalty.value)
            self.updater.end_update()
        with self._saved_on_failure():
            if stats is not None:
                self.events.tell("on_ppo_epoch_end", self.experience, stats)
            if ended:
                self.events.tell("on_update_end", self.experience, self.rollout_metrics)
        if self.control.should_update_stop:
            self.updater.progress.stopped = True
        if any(gather_object([self.interrupts.received is not None])):
            self.control.should_save = self.control.should_training_stop = True

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        stepping = self.accelerator.gradient_state.sync_gradients
        return super()._clip_grad_norm(model) if stepping else torch.zeros(())

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
        rows = len(dataset if dataset is not None else self.train_dataset)
        self._sampler = RolloutSampler(
            rows, args.rollout_batch_size, repeats, args.shuffle_dataset, args.seed, args.num_generations
        )
        return self._sampler

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
                done = episodes * (1 - self._initial_global_step / max(self.state.global_step, 1))
                logs["eps"] = done / (time.time() - start_time)
            logs |= {f"time/{phase}": seconds for phase, seconds in self.collector.seconds.items()}
            logs["memory/peak_gib"] = peak_memory(self.accelerator.device) / 2**30
            self.collector.seconds.clear()
        super().log(logs, start_time)
        if "loss" in logs and self.args.log_completions and self.experience is not None:
            extra = gather_object([dict(self.collector.reports.columns)])
            if self.is_world_process_zero():
                step = self.state.global_step
                frame = completions_frame(self.experience, self.collector.score_names, step, extra)
                save_completions(frame, str(self.args.output_dir), step)
                print_completions(frame, self.args.num_completions_to_print, f"Step {step}")

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer every prompt once, always with the same random numbers, and report the rollout's metrics."""
        if self.collector.combination.needs_reference and self.train_dataset is not None:
            self.collector.normalize_by_reference(self.train_dataset, self.state)
        with self._saved_on_failure():
            judged, reported = self.collector.all_of(dataloader, self.state)
            experience = make_experience(judged, self.args)
            metrics = summarize(experience, self.args, self.collector.score_names) | reported
            metrics["completions/eos_rate"] = 1.0 - metrics["completions/clipped_ratio"]
            self.events.tell("on_evaluation_end", experience, metrics)
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=prefixed, num_samples=len(experience.kl))
