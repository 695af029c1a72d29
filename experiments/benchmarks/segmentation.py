"""The training step and the prediction of the U-Net compared with the same network in PyTorch.

    python experiments/benchmarks/segmentation.py [--rounds 9] [--compiled]    # needs PyTorch, in the same environment

Both do the same in float32: forward, Dice loss and cross-entropy, backward, clipping, AdamW and the moving average;
prediction is the forward pass and the softmax. Augmentation is off, and freed memory is kept, as in training. The
weights are those of the JAX network, and outputs and losses must agree before anything is timed. PyTorch runs eagerly
in both memory formats and, with --compiled, through torch.compile; the fastest is the peer. Its threads sleep while
they wait, so that they do not take the cores from ours on a busy machine. Rounds are interleaved, and a ratio is the
median over the rounds. XLA counts operations and bytes; the limit is the CPU time of the operations at the rate of a
matrix product of 2048x2048, or of the bytes at the rate of a copy of 256 MiB, whichever is longer, both measured in the
same run. CPU time is that of all threads; unlike wall time, other processes on the machine hardly change it.

Writes segmentation.json and segmentation.md beside this file.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads
import torch
from torch.nn import functional

from pulmo_jax.data.codes import Classes
from pulmo_jax.host.resources import keep_freed_memory
from pulmo_jax.methods.segmentation import SegmentationNetwork
from pulmo_jax.models.unet import ConvEncoder, UNet
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step

HERE = Path(__file__).parent
SETUPS = ((192, 1, 8, 16), (192, 3, 8, 32))  # patch, channels, batch, features of the first scale
CLASSES, DECAY, RATE, CLIP = Classes(("a", "b"), (1, 2)), 0.99, 2e-3, 1.0
OURS = "pulmo_jax"


class Stage(torch.nn.Module):
    """models.unet.Stage: a residual stage of group normalisations, rectifiers and convolutions."""

    def __init__(self, stage: Any):
        super().__init__()
        self.norms = torch.nn.ModuleList(map(group_norm, stage.norms))
        self.convs = torch.nn.ModuleList(map(conv, stage.convs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for norm, layer in zip(self.norms, self.convs, strict=True):
            y = layer(functional.relu(norm(y), inplace=True))
        return x + y


class Network(torch.nn.Module):
    """models.unet.UNet in PyTorch, with the weights of `model`.

    A stride of 2 pads one row and column at the far sides in JAX; `same` does this too, and otherwise PyTorch pads all
    sides, as its users do: it saves a copy.
    """

    def __init__(self, model: UNet, same: bool):
        super().__init__()
        encoder, decoder, every = model.encoder, model.decoder, torch.nn.ModuleList
        self.same, self.block = same, encoder.stem
        self.first = conv(encoder.first, blocks=self.block**2)
        self.down = every([conv(layer, stride=2, padding=0 if same else 1) for layer in encoder.down])
        self.stages, self.merge = every(map(Stage, encoder.stages)), every(map(Stage, decoder.stages))
        self.up = every([conv(layer) for layer in decoder.up])
        self.last = group_norm(model.last[0])
        kernel, bias = (np.array(a) for a in (model.head.split.kernel, model.head.split.bias))
        outputs = len(bias) // self.block**2  # features_to_blocks has the features last, pixel_shuffle first
        order = np.arange(len(bias)).reshape(-1, outputs).T.ravel()
        self.split = torch.nn.Conv2d(len(kernel), len(bias), 1)
        self.split.weight.data, self.split.bias.data = (
            torch.tensor(kernel.T[order][..., None, None]),
            torch.tensor(bias[order]),
        )
        head = conv(model.head.conv)
        self.head = torch.nn.Conv2d(outputs, head.out_channels, 3, padding=1)
        self.head.weight.data, self.head.bias.data = head.weight.data, torch.tensor(np.array(model.head.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, P, P)"""
        x = self.stages[0](self.first(functional.pixel_unshuffle(x, self.block)))
        skips = [x]
        for down, stage in zip(self.down, self.stages[1:], strict=True):
            x = stage(down(functional.pad(x, (0, 1, 0, 1)) if self.same else x))
            skips.append(x)
        for skip, up, stage in reversed(list(zip(skips, self.up, self.merge, strict=False))):
            x = stage(skip + functional.interpolate(up(x), scale_factor=2.0, mode="bilinear"))
        pixels = functional.pixel_shuffle(self.split(functional.relu(self.last(x), inplace=True)), self.block)
        return self.head(functional.relu(pixels, inplace=True))


def group_norm(norm: Any) -> torch.nn.GroupNorm:
    return torch.nn.GroupNorm(norm.groups, norm.scale.size)  # initially without scale and bias, as ours


def conv(layer: Any, stride: int = 1, padding: int | None = None, blocks: int = 1) -> torch.nn.Conv2d:
    """The convolution in PyTorch; with `blocks`, its inputs are blocks of pixels in the order of pixel_unshuffle."""
    kernel = np.array(layer.kernel)
    height, width, inputs, outputs = kernel.shape
    kernel = kernel.reshape(height, width, blocks, inputs // blocks, outputs).swapaxes(2, 3).reshape(kernel.shape)
    padding = height // 2 if padding is None else padding
    made = torch.nn.Conv2d(inputs, outputs, height, stride, padding, bias=False)
    made.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
    return made


def torch_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """segmentation_losses.combined with its defaults; all pixels are labelled."""
    p = functional.softmax(logits, 1)[:, 1:]
    truth = functional.one_hot(codes, logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].to(p.dtype)
    overlap, total = (p * truth).sum((0, 2, 3)), p.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return functional.cross_entropy(logits, codes) + 1 - ((overlap + 1) / (0.5 * total + 1)).mean()


def torch_runs(network: Network, batch: tuple[np.ndarray, ...], layout: Any, compiled: bool) -> tuple[Callable, ...]:
    """The training step and the prediction."""
    network = network.to(memory_format=layout)
    images = torch.tensor(batch[0]).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    codes, forward = torch.tensor(batch[1]).long(), torch.compile(network) if compiled else network
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4, foreach=True)
    average = [p.detach().clone() for p in parameters]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = torch_loss(forward(images), codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)
        loss.item()

    def predict() -> None:
        with torch.inference_mode():
            functional.softmax(forward(images), 1)

    return step, predict


def jax_runs(method: SegmentationNetwork, batch: tuple[np.ndarray, ...]) -> tuple[tuple[Callable, Any], ...]:
    """The training step and the prediction, each with its compiled program."""
    optimizer, data = adamw(steps=10_000, learning_rate=RATE, clip_norm=CLIP), tuple(map(jnp.asarray, batch))
    params = method.init(jax.random.key(0))
    alone: Any = Unaugmented(method)
    state: Any = init_state(alone, optimizer)
    program = make_step(alone, optimizer, DECAY, 0).lower(state, data).compile()
    forward = jax.jit(method.probabilities).lower(params, data[0]).compile()

    def step() -> None:
        nonlocal state
        state, info = program(state, data)
        float(info["loss"])

    return (step, program), (lambda: forward(params, data[0]).block_until_ready(), forward)


class Unaugmented:
    """The method with fixed initial parameters and without augmentation."""

    def __init__(self, method: SegmentationNetwork):
        self.init = lambda: method.init(jax.random.key(0))
        self.train_loss = lambda params, batch, key: method.batch_loss(params, *batch)


def require_same(method: SegmentationNetwork, model: UNet, batch: tuple[np.ndarray, ...]) -> None:
    expected = np.asarray(model(jnp.asarray(batch[0])))
    with torch.no_grad():
        logits = Network(model, same=True)(torch.tensor(batch[0]).permute(0, 3, 1, 2))
        loss = float(torch_loss(logits, torch.tensor(batch[1]).long()))
    np.testing.assert_allclose(logits.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-4 * abs(expected).max())
    ours = method.batch_loss(method.init(jax.random.key(0)), *map(jnp.asarray, batch))
    np.testing.assert_allclose(loss, float(ours), rtol=1e-5)


def timed(function: Callable[[], Any], times: int = 1) -> tuple[float, float]:
    """Wall and CPU milliseconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        function()
    return 1000 * (time.perf_counter() - wall) / times, 1000 * (time.process_time() - cpu) / times


def interleaved(runs: dict[str, Callable[[], None]], rounds: int, each: int = 1) -> dict[str, np.ndarray]:
    """Wall and CPU milliseconds (rounds, 2) of each, in another order every round."""
    for run in runs.values():
        timed(run)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for r in range(rounds):
        names = list(runs)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(timed(runs[name], each))
    return {name: np.array(values) for name, values in times.items()}


def rates(rounds: int) -> tuple[float, float]:
    """GFLOP of a matrix product, and GB (read and written) of a copy, per second of CPU time."""
    a, b = jnp.ones((2048, 2048)), np.ones(2**25)
    product, copy = jax.jit(lambda x: x @ x), np.empty_like(b)
    product(a).block_until_ready()
    product_ms = min(timed(lambda: product(a).block_until_ready())[1] for _ in range(rounds))
    copy_ms = min(timed(lambda: np.copyto(copy, b))[1] for _ in range(rounds))
    return 2 * 2048**3 / product_ms / 1e6, 2 * b.nbytes / copy_ms / 1e6


def summary(task: str, times: dict[str, np.ndarray], program: Any, limits: tuple[float, float]) -> dict[str, Any]:
    wall, cpu = ({name: values[:, i] for name, values in times.items()} for i in (0, 1))
    peer = min((name for name in times if name != OURS), key=lambda name: float(np.median(wall[name])))
    cost = program.cost_analysis()
    gflop, gbyte = cost["flops"] / 1e9, cost["bytes accessed"] / 1e9
    limit_ms = 1000 * max(gflop / limits[0], gbyte / limits[1])
    return {
        "task": task,
        "ms": {name: float(np.median(values)) for name, values in wall.items()},
        "spread_ms": {name: [float(values.min()), float(values.max())] for name, values in wall.items()},
        "cpu_ms": {name: float(np.median(values)) for name, values in cpu.items()},
        "peer": peer,
        "ratio": float(np.median(wall[OURS] / wall[peer])),
        "cpu_ratio": float(np.median(cpu[OURS] / cpu[peer])),
        "gflop": gflop,
        "gbyte": gbyte,
        "limit_cpu_ms": limit_ms,
        "cpu_ratio_to_limit": float(np.median(cpu[OURS])) / limit_ms,
        "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
    }


def compare(
    patch: int, channels: int, batch: int, width: int, rounds: int, compiled: bool, limits: Any
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    data = rng.random((batch, patch, patch, channels), np.float32), rng.integers(0, 3, (batch, patch, patch), np.uint8)
    method = SegmentationNetwork(CLASSES, patch, channels, network=unet(width))
    model = method.member(jax.random.key(0))
    require_same(method, model, data)
    ours = jax_runs(method, data)
    runs: list[dict[str, Callable]] = [{OURS: run} for run, _ in ours]
    variants = [
        ("PyTorch, channels last", torch.channels_last, False),
        ("PyTorch, channels first", torch.contiguous_format, False),
        ("PyTorch, compiled", torch.channels_last, True),
    ]
    for name, layout, through in variants[: 3 if compiled else 2]:
        for tasks, run in zip(runs, torch_runs(Network(model, same=False), data, layout, through), strict=True):
            tasks[name] = run
    setup = f"{batch} patches of {patch}x{patch}x{channels}, width {width}"
    return [
        summary(f"{task}, {setup}", interleaved(tasks, rounds), program, limits)
        for task, tasks, (_, program) in zip(("training step", "prediction"), runs, ours, strict=True)
    ]


def unet(width: int) -> Callable[..., UNet]:
    """U-Net of the default config with another number of features."""

    def build(**shapes: Any) -> UNet:
        return UNet(**shapes, encoder=lambda **given: ConvEncoder(**given, width=width), width=width)

    return build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    given = parser.parse_args()
    rounds = given.rounds
    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    limits = rates(rounds)
    rows = [row for setup in SETUPS for row in compare(*setup, rounds, given.compiled, limits)]
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, PyTorch {torch.__version__}"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {versions}"
    result = {
        "machine": machine,
        "matmul_gflop_per_cpu_s": limits[0],
        "copy_gb_per_cpu_s": limits[1],
        "rounds": rounds,
        "rows": rows,
    }
    (HERE / "segmentation.json").write_text(json.dumps(result, indent=2) + "\n")
    names = list(rows[0]["ms"])
    command = f"python experiments/benchmarks/segmentation.py --rounds {rounds}" + " --compiled" * given.compiled
    lines = [
        f"`{command}`: {machine}; "
        f"a float32 matrix product reaches {limits[0]:.0f} GFLOP and a copy {limits[1]:.0f} GB per CPU second. "
        "Medians in ms (lowest to highest round); CPU: user and system time of all threads; ratios: medians over the "
        "rounds, to the fastest PyTorch.\n",
        f"| | {' | '.join(names)} | ratio | ratio of CPU time | GFLOP | GB | CPU time relative to the limit |",
        f"|{' --- |' * (len(names) + 6)}",
    ]
    for row in rows:
        cells = [
            f"{row['ms'][n]:.0f} ({low:.0f} to {high:.0f}), CPU {row['cpu_ms'][n]:.0f}"
            for n, (low, high) in row["spread_ms"].items()
        ]
        lines.append(
            f"| {row['task']} | {' | '.join(cells)} | {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | "
            f"{row['gflop']:.1f} | {row['gbyte']:.2f} | {row['cpu_ratio_to_limit']:.1f} |"
        )
    (HERE / "segmentation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
