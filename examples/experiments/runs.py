"""The runs whose results docs/experiments.md gives: each is settings of `verl-speculator train`, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, object]

_COMMON: Settings = {
    "data.train_batch_size": 16,
    "data.micro_batch_size_per_gpu": 16,
    "data.use_dynamic_bsz": False,
    "data.max_length": 512,
    "data.truncation": "right",
    "data.num_workers": 0,
    "model.speculator.draft_vocab_size": 8000,
    "optim.weight_decay": 0.1,
    "optim.lr_scheduler_type": "cosine",
    "optim.lr_warmup_steps_ratio": 0.04,
}
_HEADS: Settings = {
    **_COMMON,
    "model.speculator.n_predict": 3,
    "model.speculator.inner_dim": 256,
    "model.speculator.objective": "kl",
    "model.speculator.scale_input": True,
    "optim.lr": 5e-3,
}
_LSTM: Settings = {
    **_HEADS,
    "model.speculator_type": "lstm",
    "model.speculator.method": "sum_lstm",
    "model.speculator.emb_dim": 256,
    "model.speculator.proj_dim": 256,
    "model.speculator.tie_lstm_embs": True,
}
_MLP: Settings = {**_HEADS, "model.speculator_type": "mlp"}
_EAGLE3: Settings = {**_COMMON, "model.speculator_type": "eagle3", "optim.lr": 1e-3, "+model.speculator.ttt_steps": 3}
_DFLASH: Settings = {
    **_COMMON,
    "model.speculator_type": "dflash",
    "optim.lr": 1e-3,
    "+model.speculator.num_layers": 2,
    "+model.speculator.block_size": 4,
    "+model.speculator.anchor_fraction": 0.5,
}


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        num_rows: Of the training answers, from the first on.
        num_epochs: How long it trains, if not until `cpu_seconds`.
        cpu_seconds: Of training, over all threads: what a step takes is measured first, and decides the steps.
        decode: Whether the speculator is also decoded with, on the test prompts.
    """

    settings: Settings
    num_rows: int = 640
    num_epochs: int | None = 6
    cpu_seconds: float | None = None
    seeds: tuple[int, ...] = (0,)
    decode: bool = False
    data: str = "train"
    changes: Settings = field(default_factory=dict)

    @property
    def reads_layers(self) -> bool:
        """Whether the speculator reads states of layers below the last one."""
        return self.settings["model.speculator_type"] in ("eagle3", "dflash")

    @property
    def overrides(self) -> dict[str, object]:
        return {**self.settings, **self.changes}


def _alike(settings: Settings) -> Run:
    return Run(settings, num_epochs=None, cpu_seconds=600, decode=True)


RUNS: dict[str, Run] = {
    "time_lstm": _alike(_LSTM),
    "time_eagle3": _alike(_EAGLE3),
    "time_dflash": _alike(_DFLASH),
    "time_mlp": _alike(_MLP),
    "rows_160": Run(_LSTM, num_rows=160, num_epochs=24),
    "rows_320": Run(_LSTM, num_rows=320, num_epochs=12),
    "rows_640": Run(_LSTM, seeds=(0, 1, 2)),
    "rows_1000": Run(_LSTM, num_rows=1000, num_epochs=4),
    "people": Run(_LSTM, data="people"),
    "ce": Run(_LSTM, changes={"model.speculator.objective": "ce"}, seeds=(0, 1, 2)),
    "full_vocabulary": Run(_LSTM, changes={"model.speculator.draft_vocab_size": None}),
}
