"""The training loop that the torchrun trainer and its Ray twin share."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from tensordict.tensorclass import NonTensorData
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.tracking import Tracking
from verl.workers.config import TrainingWorkerConfig

from verl_speculator.adapters import SpeculatorAdapter, build_speculator_adapter
from verl_speculator.data.loading import PaddedEvaluation, ResumableSampler
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.step_sums import SUMS_KEY
from verl_speculator.models.serialization import SUBFOLDER
from verl_speculator.trainer.checkpoints import Position, RunCheckpoints
from verl_speculator.trainer.draft_vocabulary import choose_draft_vocabulary
from verl_speculator.trainer.metrics_log import MetricsLog
from verl_speculator.trainer.processes import Processes


class SpeculatorTrainingLoop(ABC):
    """Mixed into verl's two `SFTTrainer` classes, which build configuration, dataset and workers.

    verl calls `_build_dataloader`, `_build_engine` and `_build_ckpt_handler` from its constructor, in an order that
    differs between the two, and then `ckpt_handler.load_checkpoint()`.
    """

    # From verl's trainers
    config: Any
    model_config: Any
    engine_config: Any
    optimizer_config: Any
    checkpoint_config: Any
    profiler_config: Any
    train_dataset: Dataset
    val_dataset: Dataset | None
    training_client: Any
    start_profile_step: int
    end_profile_step: int
    _get_batch_seqlens: Callable[..., Any]

    ckpt_handler: RunCheckpoints
    processes: Processes
    _adapter: SpeculatorAdapter
    _sigterm_received = False
    _is_profiling = False

    @abstractmethod
    def data_shard(self) -> tuple[int, int]:
        """Which part of each global batch this process loads: its rank and the number of parts."""

    @abstractmethod
    def data_parallel_size(self) -> int:
        """The number of parts into which a batch is finally cut, here or by the workers."""

    @abstractmethod
    def is_logging(self) -> bool:
        """Whether this process reports; one does."""

    @abstractmethod
    def train_batch(self, batch: Any) -> dict[str, Any] | None:
        """Run one step; its metrics, or None on a process that has none."""

    @abstractmethod
    def infer_batch(self, batch: Any) -> dict[str, Any] | None:
        """The metrics of one batch without training on it, or None on a process that has none."""

    def worker_config(self) -> TrainingWorkerConfig:
        return TrainingWorkerConfig(
            model_type=MODEL_TYPE,
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )

    def chosen_draft_vocabulary(self) -> dict[str, Any]:
        """Settings of `model.speculator` that follow from the data; one process asks, before an engine is built."""
        vocab_size = self.model_config.hf_config.get_text_config().vocab_size
        return choose_draft_vocabulary(self.config, self.train_dataset, vocab_size)

    def _build_dataloader(self) -> None:
        data = self.config.data
        rank, num_shards = self.data_shard()
        self.global_batch_size = data.train_batch_size
        self.train_sampler = ResumableSampler(self.train_dataset, rank, num_shards, self.config.trainer.seed)
        self.train_dataloader = DataLoader(
            self.train_dataset,
            batch_size=self.global_batch_size // num_shards,
            sampler=self.train_sampler,
            # A step on fewer rows would weigh them more.
            drop_last=True,
            num_workers=data.num_workers,
            collate_fn=SFTTensorCollator(data.pad_mode),
        )
        self.val_dataloader = None
        if self.val_dataset:
            # The last batch too must be cut evenly, among ranks and into micro-batches.
            multiple = self.data_parallel_size() * (1 if data.use_dynamic_bsz else data.micro_batch_size_per_gpu)
            padded = PaddedEvaluation(self.val_dataset, multiple)
            self.val_dataloader = DataLoader(
                padded,
                batch_size=self.global_batch_size // num_shards,
                sampler=range(rank, len(padded), num_shards),
                num_workers=data.num_workers,
                collate_fn=SFTTensorCollator(data.pad_mode),
            )

    def _plan_steps(self) -> None:
        """Steps an epoch and in all, and how often to validate and save; verl's meanings."""
        trainer = self.config.trainer
        self.steps_per_epoch = len(self.train_dataloader)
        self.total_training_steps = trainer.total_training_steps or self.steps_per_epoch * trainer.total_epochs
        self.optimizer_config.total_training_steps = self.total_training_steps
        self.save_freq, self.test_freq = (
            self.steps_per_epoch if freq == "after_each_epoch" else freq
            for freq in (trainer.save_freq, trainer.test_freq)
        )

    def fit(self) -> bool:
        """Train to the last step, validating and saving on the way.

        SIGTERM, which schedulers send some time before they kill, ends training after the step at hand with a
        checkpoint. It is enough that one process receives it.

        Returns:
            Whether there is nothing left to do; False after SIGTERM.
        """
        # Only its arithmetic on metrics is used here; the engines have adapters with a speculator.
        self._adapter = build_speculator_adapter(self.model_config.speculator_adapter, self.model_config.speculator)
        position = self.ckpt_handler.position
        self._tracking, self._metrics_log = None, None
        if self.is_logging():
            self._tracking = Tracking(
                project_name=self.config.trainer.project_name,
                experiment_name=self.config.trainer.experiment_name,
                default_backend=self.config.trainer.logger,
                config=OmegaConf.to_container(self.config, resolve=True),
            )
            self._metrics_log = MetricsLog(self.config.trainer.default_local_dir, position.global_step)
        before = signal.signal(signal.SIGTERM, self._remember_sigterm)
        try:
            return self._run(position)
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._is_profiling:
                self.training_client.stop_profile()
            self.ckpt_handler.close()
            if self._tracking is not None:
                self._tracking.finish()
            if self._metrics_log is not None:
                self._metrics_log.close()

    def _remember_sigterm(self, number: int, frame: object) -> None:
        # It may come again, from the scheduler and from torchrun: only SIGKILL ends the process before it has saved.
        self._sigterm_received = True

    def _run(self, position: Position) -> bool:
        if self.config.trainer.val_before_train or self.config.trainer.val_only:
            self._validate(position.global_step)
        if self.config.trainer.val_only:
            return not self.processes.is_any(self._sigterm_received)
        if position.global_step >= self.total_training_steps:
            self._say(
                f"Nothing to train: this run ended with step {position.global_step}, its results are in "
                f"{self.config.trainer.default_local_dir}; to train longer raise trainer.total_epochs or "
                "trainer.total_training_steps"
            )
            return True
        for batch in self._batches(position):
            self._log(self._train_step(batch, position), position.global_step)
            is_last = position.global_step >= self.total_training_steps
            if is_last or _is_due(self.test_freq, position.global_step):
                self._validate(position.global_step)
            # Asked at one point of every step: processes that saved at different ones would wait for each other.
            stops = self.processes.is_any(self._sigterm_received)
            if is_last or stops or _is_due(self.save_freq, position.global_step):
                folder = self.ckpt_handler.save()
                self._say(f"Saved {folder / SUBFOLDER}")
            if stops and not is_last:
                self._say(f"Stopped by SIGTERM after step {position.global_step}: the same command goes on from there")
                return False
        return True

    def _batches(self, position: Position) -> Iterator[Any]:
        """Batches from `position` on, which is kept up to date, until the last step."""
        # Saved after an epoch's last batch: that epoch is over, and entering it would give no batch.
        if position.samples >= self.steps_per_epoch * self.global_batch_size:
            position.epoch, position.samples = position.epoch + 1, 0
        with tqdm(
            total=self.total_training_steps,
            initial=position.global_step,
            desc="Training",
            unit="step",
            disable=not self.is_logging(),
        ) as self._progress:
            while position.global_step < self.total_training_steps:
                self.train_sampler.set_epoch(position.epoch)
                self.train_sampler.skip_once(position.samples)
                for batch in self.train_dataloader:
                    # Ahead of the step, for a checkpoint saved while the caller has the batch.
                    position.global_step += 1
                    position.samples += self.global_batch_size
                    yield batch
                    self._progress.update()
                    if position.global_step >= self.total_training_steps:
                        return
                position.epoch, position.samples = position.epoch + 1, 0

    def _train_step(self, batch: Mapping[str, Any], position: Position) -> dict[str, float]:
        data = self._tensordict(batch)
        # Of the whole batch, over all ranks: a list from one of verl's trainers, a tensor from the other.
        lengths = self._get_batch_seqlens(data=data)
        seqlens = lengths if isinstance(lengths, list) else lengths.tolist()
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=NonTensorData(seqlens))
        if self.start_profile_step <= position.global_step <= self.end_profile_step and not self._is_profiling:
            self.training_client.start_profile()
            self._is_profiling = True
        start = time.perf_counter()
        output = self.train_batch(data)
        seconds = time.perf_counter() - start
        # Here, so that the profile covers no validation and no save, and ends even at the run's last step.
        if self._is_profiling and position.global_step == self.end_profile_step:
            self.training_client.stop_profile()
            self._is_profiling = False
        position.total_tokens += sum(seqlens)
        if output is None:
            # Another rank has the outputs of these rows.
            return {}
        metrics = self._summarize(output.pop(SUMS_KEY)[0])
        metrics["loss"] = output.pop("loss")
        metrics |= {name: output.pop(name) for name in ("grad_norm", "lr", "mfu") if name in output}
        self._progress.set_postfix(loss=f"{metrics['loss']:.3f}", accept=f"{metrics.get('acceptance_length', 0):.2f}")
        return {
            **{f"train/{name}": value for name, value in metrics.items()},
            "train/global_tokens": sum(seqlens),
            "train/total_tokens(B)": position.total_tokens / 1e9,
            "perf/tokens_per_second": sum(seqlens) / seconds,
            "perf/step_seconds": seconds,
            **{name: value for name, value in output.items() if name.startswith("perf/")},
        }

    def _validate(self, global_step: int) -> None:
        """Log the averages over the whole validation set, unless SIGTERM comes."""
        totals: dict[str, float] = defaultdict(float)
        for batch in self.val_dataloader or ():
            if self.processes.is_any(self._sigterm_received):
                # A scheduler grants seconds, and a validation can take minutes.
                return
            output = self.infer_batch(self._tensordict(batch))
            for name, value in (output[SUMS_KEY][0] if output is not None else {}).items():
                totals[name] += value
        if totals and self.is_logging():
            # Losses of batches do not average to that of the whole; the sums do.
            sums = {name: value for name, value in totals.items() if name not in ("speculator_loss", "base_loss")}
            self._log({f"val/{name}": value for name, value in self._summarize(sums).items()}, global_step)

    def _summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = self._adapter.summarize_metrics(sums)
        metrics |= {name: sums[name] for name in ("speculator_loss", "base_loss") if name in sums}
        if sums.get("base/count"):
            metrics["base_loss"] = sums["base/loss_sum"] / sums["base/count"]
        return metrics

    def _tensordict(self, batch: Mapping[str, Any]) -> Any:
        data = self.config.data
        settings = {
            "use_remove_padding": self.config.model.use_remove_padding,
            "use_dynamic_bsz": data.use_dynamic_bsz,
            "max_token_len_per_gpu": data.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
            "temperature": 1.0,
            "global_batch_size": self.global_batch_size,
            "pad_mode": data.pad_mode,
            "pad_token_id": self.model_config.tokenizer.pad_token_id,
        }
        return tu.get_tensordict(tensor_dict=dict(batch), non_tensor_dict=settings)

    def _say(self, text: str) -> None:
        if self.is_logging():
            # Not in the middle of the progress bar.
            tqdm.write(text)

    def _log(self, metrics: dict[str, float], global_step: int) -> None:
        if self._tracking is not None and metrics:
            self._tracking.log(data=metrics, step=global_step)
        if self._metrics_log is not None:
            self._metrics_log.append(global_step, metrics)


def _is_due(frequency: int, step: int) -> bool:
    return frequency > 0 and step % frequency == 0
