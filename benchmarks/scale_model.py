"""What a training on many GPUs takes, on paper: memory of a rank, bytes that it sends in a step, tokens a second.

    python benchmarks/scale_model.py            # the tables of docs/scaling.md

Every term is a product of sizes, stated where it is computed. What a machine reaches is assumed and stands in
`Machine`; how much is sent is checked against the engine (`tests/integration/test_traffic.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

BF16, FP32 = 2, 4
GB = 1e9


@dataclass(frozen=True)
class Base:
    """A frozen base: the sizes of a Llama."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocab: int = 128256

    @property
    def layer_parameters(self) -> int:
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    @property
    def parameters(self) -> int:
        """Without `lm_head`, which does not run."""
        return self.layer_parameters + self.vocab * self.hidden + self.hidden

    def forward_flops(self, length: int) -> float:
        """Of a token in a sequence of this length: two for each weight, and half of the attention's square."""
        return 2 * self.layer_parameters + 2 * self.layers * self.hidden * length


@dataclass(frozen=True)
class Speculator:
    """A tied `sum_lstm` of one width, with one embedding for its gates."""

    width: int
    heads: int
    vocab: int
    hidden: int

    @property
    def chain_parameters(self) -> int:
        return 4 * self.width * (self.hidden + self.width)

    @property
    def parameters(self) -> int:
        return 2 * self.vocab * self.width + self.chain_parameters

    def train_flops(self, share_trained: float) -> float:
        """Of a token: forward pass and two gradients, of the chain's step and of the vocabulary product."""
        return 6 * share_trained * self.heads * (4 * 2 * self.width**2 + self.vocab * self.width)


@dataclass(frozen=True)
class Machine:
    """An H100 machine of eight. Reached, not promised: half of the matrix units, two thirds of the links."""

    flops: float = 0.5 * 989e12
    memory: float = 80 * GB
    inside: float = 300 * GB  # bytes a second and GPU between the GPUs of a machine
    network: float = 33 * GB  # bytes a second and GPU between machines
    size: int = 8
    chunk: float = 0.5 * GB  # of logits


@dataclass(frozen=True)
class Run:
    """How the work is cut; tokens are of a rank and step.

    Attributes:
        shard: Ranks over which base and speculator are cut.
        stays_gathered: `engine.reshard_after_forward=auto` where it fits.
        tensor_parallel: Megatron's; 1 is FSDP.
        cached: Hidden states come from a disk, and the base does not run.
        soft_targets: The objective needs the base's vocabulary matrix.
    """

    ranks: int
    shard: int
    tokens: int = 16384
    micro_batch: int = 8192
    length: int = 2048
    share_trained: float = 0.6
    stays_gathered: bool = False
    tensor_parallel: int = 1
    cached: bool = False
    soft_targets: bool = False


def gathered(size: float, ranks: int) -> float:
    """What a rank receives to have all of something that is cut evenly, or sends to reduce it."""
    return size * (ranks - 1) / ranks


def base_bytes(base: Base, run: Run) -> float:
    """Received by a rank in a step for the base."""
    if run.cached:
        return 0
    if run.tensor_parallel > 1:
        # Two sums of the states in a layer, each as a reduction and a gathering of what is cut, and nothing of weights.
        sums = 2 * 2 * base.layers * run.tokens * run.tensor_parallel * base.hidden * BF16
        return gathered(sums, run.tensor_parallel)
    return 0 if run.stays_gathered else gathered(run.tokens / run.micro_batch * base.parameters * BF16, run.shard)


def speculator_bytes(base: Base, speculator: Speculator, run: Run) -> tuple[float, float]:
    """Sent or received by a rank in a step for the speculator: among ranks that share it, and between such groups."""
    head = base.vocab * base.hidden * BF16 if run.soft_targets else 0
    weights, gradient = speculator.parameters * BF16 + head, speculator.parameters * FP32
    groups = run.ranks // run.shard
    return gathered(weights + gradient, run.shard), 2 * gathered(gradient / run.shard, groups)


def memory(base: Base, speculator: Speculator, run: Run, machine: Machine) -> float:
    """Of a rank, at its most."""
    cut = run.tensor_parallel if run.tensor_parallel > 1 else run.shard
    layer = base.layer_parameters / base.layers
    held = 0.0 if run.cached else base.parameters * BF16 / (1 if run.stays_gathered else cut)
    # The layer at work and the next one, gathered.
    held += 0 if run.cached or run.stays_gathered or run.tensor_parallel > 1 else 2 * layer * BF16
    # Weights, gradient and two moments, cut; and in full while a step lasts, weights and gradient.
    held += speculator.parameters * (4 * FP32 / run.shard + BF16 + FP32)
    if run.soft_targets:
        held += base.vocab * base.hidden * BF16 * (1 + 1 / run.shard)
    # States of a layer: the residual stream and a few of its size, and the widest product.
    states = run.micro_batch * (4 * base.hidden + 2 * base.intermediate) * BF16
    chain = run.share_trained * run.micro_batch * speculator.heads * 12 * speculator.width * BF16
    return held + states + chain + machine.chunk


def seconds(base: Base, speculator: Speculator, run: Run, machine: Machine) -> float:
    """Of a step. Layers are gathered while others compute; nothing hides what the speculator sends."""
    link = machine.inside if run.shard <= machine.size else machine.network
    base_link = machine.inside if run.tensor_parallel > 1 else link
    compute = 0 if run.cached else run.tokens * base.forward_flops(run.length) / machine.flops
    traffic = base_bytes(base, run) / base_link
    # Tensor parallelism waits for its sums; gathering weights runs ahead.
    forward = compute + traffic if run.tensor_parallel > 1 else max(compute, traffic)
    own = run.tokens * speculator.train_flops(run.share_trained)
    own += 2 * run.tokens * base.vocab * base.hidden if run.soft_targets else 0
    within, between = speculator_bytes(base, speculator, run)
    return forward + own / machine.flops + within / link + between / machine.network


LLAMA_8B = Base("Llama 8B", 4096, 32, 14336, 32, 8)
LLAMA_70B = Base("Llama 70B", 8192, 80, 28672, 64, 8)


def layouts(base: Base, ranks: int) -> dict[str, Run]:
    whole = {"FSDP over all": Run(ranks, ranks)}
    if ranks > 8:
        whole["FSDP, cut within a machine"] = Run(ranks, 8)
    if base is LLAMA_8B:
        whole["FSDP within a machine, base stays gathered"] = Run(ranks, 8, stays_gathered=True)
    else:
        whole["Megatron, TP 8"] = Run(ranks, 8, tensor_parallel=8)
    whole["hidden states from a disk"] = Run(ranks, 8, cached=True)
    return whole


def speculator_of(base: Base) -> Speculator:
    return Speculator(width=4096, heads=3, vocab=32000, hidden=base.hidden)


def tables(machine: Machine = Machine()) -> str:
    lines = []
    for base in (LLAMA_8B, LLAMA_70B):
        speculator = speculator_of(base)
        lines += [
            f"**{base.name}**, {base.parameters / 1e9:.1f} G parameters without `lm_head`; speculator "
            f"{speculator.parameters / 1e6:.0f} M",
            "",
            "| GPUs | layout | memory of a rank, GB | base, GB a step | speculator, GB a step | tokens/s | of a GPU |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for ranks in (8, 64, 512):
            for name, run in layouts(base, ranks).items():
                rate = run.tokens / seconds(base, speculator, run, machine)
                lines.append(
                    f"| {ranks} | {name} | {memory(base, speculator, run, machine) / GB:.0f} "
                    f"| {base_bytes(base, run) / GB:.1f} | {sum(speculator_bytes(base, speculator, run)) / GB:.1f} "
                    f"| {ranks * rate:,.0f} | {rate:,.0f} |"
                )
        lines.append("")
    return "\n".join([*lines, *_cost_of_ten_billion_tokens(machine)])


# Assumed, for H100s: tokens a second and GPU that vLLM writes at full batches, dollars a GPU-hour, dollars for a GB of
# shared disk a month.
ANSWER_RATE = {LLAMA_8B: 5000, LLAMA_70B: 500}
GPU_HOUR, DISK_MONTH = 2.0, 0.05
TOKENS = 10e9


def _cost_of_ten_billion_tokens(machine: Machine) -> list[str]:
    lines = ["| 10 billion tokens | " + " | ".join(base.name for base in ANSWER_RATE) + " |", "| --- | --- | --- |"]
    rows: dict[str, list[str]] = {}
    for base, rate in ANSWER_RATE.items():
        speculator = speculator_of(base)
        run = Run(64, 8, stays_gathered=base is LLAMA_8B)
        epoch = TOKENS / run.tokens * seconds(base, speculator, run, machine) / 3600
        read = TOKENS / run.tokens * seconds(base, speculator, Run(64, 8, cached=True), machine) / 3600
        size = TOKENS * base.hidden * BF16 / GB
        answers = 0.6 * TOKENS / rate / 3600
        rows.setdefault("answers of the base, 6 of the 10 billion", []).append(_cost(answers))
        rows.setdefault("an epoch that runs the base", []).append(_cost(epoch))
        rows.setdefault("an epoch that reads hidden states", []).append(_cost(read))
        rows.setdefault("hidden states on disk", []).append(f"{size / 1e3:.0f} TB, ${size * DISK_MONTH:,.0f} a month")
        rows.setdefault("epochs a month from which the disk is cheaper", []).append(
            f"{size * DISK_MONTH / ((epoch - read) * GPU_HOUR):.0f}"
        )
        rows.setdefault("read by 64 GPUs, GB/s", []).append(f"{size / (read / 64 * 3600):.0f}")
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())]


def _cost(gpu_hours: float) -> str:
    return f"{gpu_hours:,.0f} GPU-hours, ${gpu_hours * GPU_HOUR:,.0f}"


if __name__ == "__main__":
    print(tables())
