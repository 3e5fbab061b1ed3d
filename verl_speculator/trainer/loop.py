"""The training loop that the torchrun trainer and its Ray twin share."""

from __future__ import annotations

import math
import signal
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
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
from verl_speculator.checkpoint.hidden_states import StatesCacheSettings
from verl_speculator.data.loading import PaddedEvaluation, ResumableSampler
from verl_speculator.engine.cached_states import PREFIX
from verl_speculator.engine.model_config import MODEL_TYPE
from verl_speculator.engine.step_sums import SUMS_KEY
from verl_speculator.errors import ConfigError
from verl_speculator.models.serialization import BEST_FILE, SUBFOLDER
from verl_speculator.trainer.checkpoints import Position, RunCheckpoints
from verl_speculator.trainer.draft_vocabulary import choose_draft_vocabulary
from verl_speculator.trainer.hidden_states import open_states_cache, plan
from verl_speculator.trainer.metrics_log import MetricsLog
from verl_speculator.trainer.processes import Processes
from verl_speculator.trainer.rows import build_rows

_TO_STOP_BY = ("closed_loop_acceptance_length", "acceptance_length")


class SpeculatorTrainingLoop(ABC):
    """Mixed into verl's two `SFTTrainer` classes, which build configuration, dataset and workers.

    verl calls `_build_dataset`, `_build_dataloader`, `_build_engine` and `_build_ckpt_handler` from its constructor, in
    an order that differs between the two, and then `ckpt_handler.load_checkpoint()`.
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
    _states_cache: StatesCacheSettings | None = None
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

    def prefetch_states(self, batch: Mapping[str, Any]) -> None:  # noqa: B027 - not every process has an engine
        """Begin to read the hidden states of the batch after the next step, where that can be done from here."""

    def _load_model(self) -> None:
        """Have the workers build their engines, with hidden states on disk if the run keeps any."""
        draft_vocab_path = self.model_config.speculator.get("draft_vocab_path")
        if draft_vocab_path is not None:
            # The first process may have written it a moment ago, and other machines see it later.
            self.processes.that_miss(Path(draft_vocab_path))
        if self.config.data.hidden_states_cache is None:
            self.training_client.reset()
            return
        revision = getattr(self.model_config.hf_config, "_commit_hash", None)
        settings = self.processes.on_first(lambda: open_states_cache(self.config, revision))
        self.training_client.use_states_cache(settings)
        self.training_client.reset()
        self._states_cache = settings
        # A list from a group of workers.
        sizes = self.training_client.states_bytes_per_token()
        bytes_per_token = sizes if isinstance(sizes, int) else sizes[0]
        datasets = [dataset for dataset in (self.train_dataset, self.val_dataset) if dataset is not None]
        said = self.processes.on_first(lambda: plan(self.config, settings, bytes_per_token, datasets))
        if self.processes.is_first:
            print(said)

    def _share_states(self) -> None:
        if self._states_cache is not None:
            self.training_client.share_states()

    def _build_dataset(self) -> None:
        data = self.config.data
        readers = self.model_config.tokenizer, self.model_config.processor
        self.train_dataset = build_rows(data, "train_files", data.train_max_samples, *readers)
        self.val_dataset = None
        if data.val_files:
            self.val_dataset = build_rows(data, "val_files", data.val_max_samples, *readers)

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
        self.val_dataloader = self._evaluation_loader(self.val_dataset) if self.val_dataset else None

    def _evaluation_loader(self, dataset: Any) -> DataLoader:
        """Every row, on one of the processes."""
        data, (rank, num_shards) = self.config.data, self.data_shard()
        # The last batch too must be cut evenly, among ranks and into micro-batches.
        multiple = self.data_parallel_size() * (1 if data.use_dynamic_bsz else data.micro_batch_size_per_gpu)
        padded = PaddedEvaluation(dataset, multiple)
        return DataLoader(
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
        if position.global_step >= self.total_training_steps or self._has_stopped_early(position):
            self._say(
                f"Nothing to train: this run ended with step {position.global_step}, its results are in "
                f"{self.config.trainer.default_local_dir}; to train longer raise trainer.total_epochs, "
                "trainer.total_training_steps or, where it was set, trainer.early_stop_patience"
            )
            return True
        patience = self.config.trainer.early_stop_patience
        for batch in self._batches(position):
            self._log(self._train_step(batch, position), position.global_step)
            is_last, is_best = position.global_step >= self.total_training_steps, False
            if is_last or _is_due(self.test_freq, position.global_step):
                value = self._validate(position.global_step)
                if patience is not None:
                    value = self.processes.largest(value)
                    # One that SIGTERM broke off has no result, on any process.
                    is_best = value > -math.inf and position.note_validation(value)
                    if value == -math.inf and not self.processes.is_any(self._sigterm_received):
                        raise ConfigError(
                            "trainer.early_stop_patience: validation measures no acceptance length of this type of "
                            "speculator, so leave it out"
                        )
            # Asked at one point of every step: processes that saved at different ones would wait for each other.
            stops = self.processes.is_any(self._sigterm_received)
            ends = is_last or stops or self._has_stopped_early(position)
            if ends or is_best or _is_due(self.save_freq, position.global_step):
                folder = self.ckpt_handler.save()
                self._say(f"Saved {folder / SUBFOLDER}")
            if ends:
                self._share_states()
                self._say_why(position, is_last=is_last, stops=stops)
                return is_last or not stops
        return True

    def _has_stopped_early(self, position: Position) -> bool:
        patience = self.config.trainer.early_stop_patience
        return patience is not None and position.validations_since_best >= patience

    def _say_why(self, position: Position, *, is_last: bool, stops: bool) -> None:
        if self._has_stopped_early(position):
            self._say(
                f"Stopped after step {position.global_step}: {position.validations_since_best} validations in a row "
                f"were no better than that of step {position.best_step}, to which {BEST_FILE} leads"
            )
        elif stops and not is_last:
            self._say(f"Stopped by SIGTERM after step {position.global_step}: the same command goes on from there")

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
                for batch, following in _with_next(self.train_dataloader):
                    if following is not None and self._states_cache is not None:
                        self.prefetch_states(following)
                    # Ahead of the step, for a checkpoint saved while the caller has the batch.
                    position.global_step += 1
                    position.samples += self.global_batch_size
                    yield batch
                    self._progress.update()
                    if position.global_step >= self.total_training_steps:
                        return
                position.epoch, position.samples = position.epoch + 1, 0
                self._share_states()

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
        sums = output.pop(SUMS_KEY)[0]
        metrics = self._summarize(sums)
        metrics["loss"] = output.pop("loss")
        metrics |= {name: output.pop(name) for name in ("grad_norm", "lr", "mfu") if name in output}
        self._progress.set_postfix(loss=f"{metrics['loss']:.3f}", accept=f"{metrics.get('acceptance_length', 0):.2f}")
        return {
            **{f"train/{name}": value for name, value in metrics.items()},
            "train/global_tokens": sum(seqlens),
            "train/total_tokens(B)": position.total_tokens / 1e9,
            "perf/tokens_per_second": sum(seqlens) / seconds,
            "perf/step_seconds": seconds,
            **_states_metrics(sums, seconds),
            **{name: value for name, value in output.items() if name.startswith("perf/")},
        }

    def _validate(self, global_step: int) -> float:
        """Log the averages over the whole validation set, unless SIGTERM comes.

        Returns:
            The acceptance length that decoding along its answers would have, on the process that logs and if it was
            measured; else minus infinity.
        """
        totals: dict[str, float] = defaultdict(float)
        for batch in self.val_dataloader or ():
            if self.processes.is_any(self._sigterm_received):
                # A scheduler grants seconds, and a validation can take minutes.
                return -math.inf
            output = self.infer_batch(self._tensordict(batch))
            for name, value in (output[SUMS_KEY][0] if output is not None else {}).items():
                totals[name] += value
        self._share_states()
        if not totals or not self.is_logging():
            return -math.inf
        # Losses of batches do not average to that of the whole; the sums do.
        sums = {name: value for name, value in totals.items() if name not in ("speculator_loss", "base_loss")}
        metrics = self._summarize(sums)
        self._log({f"val/{name}": value for name, value in metrics.items()}, global_step)
        # Not every type of speculator can tell what decoding would do.
        return next((metrics[name] for name in _TO_STOP_BY if name in metrics), -math.inf)

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


def _with_next(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each with the one after it, or None after the last."""
    iterator = iter(batches)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch, following
        batch = following


def _states_metrics(sums: Mapping[str, float], step_seconds: float) -> dict[str, float]:
    """What a step that read hidden states did without, and waited for them."""
    if f"{PREFIX}/saved_seconds" not in sums:
        return {}
    saved = sums[f"{PREFIX}/saved_seconds"]
    return {
        "perf/base_seconds_saved": saved,
        "perf/states_wait_seconds": sums[f"{PREFIX}/wait_seconds"],
        "perf/step_saved": saved / (saved + step_seconds),
    }


def _is_due(frequency: int, step: int) -> bool:
    return frequency > 0 and step % frequency == 0
