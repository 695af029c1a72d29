"""The training step compared with PyTorch, and with the data pipeline compared with one repeated batch.

    python experiments/benchmarks/train_step.py [--rounds 15]          # needs PyTorch, in the same environment

Both do the same: the denoising noise, forward, loss, backward, clipping, AdamW and the moving average, in float32. The
weights are those of the JAX network, and the losses must agree before anything is timed. PyTorch has the network in two
ways, as convolutions with kernel = stride (the layers that a PyTorch user would write) and as rearranged pixels with
matrix products; the faster one is the peer. Rounds are interleaved. The share of the machine is XLA's count of
floating-point operations against a matrix product of 2048x2048 in the same run.

The pipeline's part: 300 TIFFs of 512x512x3 (8 bits, deflate) and the loop of training itself with its reading threads,
beside the same loop on one batch. Writes train_step.json and train_step.md beside this file.
"""

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tifffile
import torch
from flax import nnx
from torch.nn import functional

from pulmo_jax.data.images import index_images
from pulmo_jax.data.pipeline import Augmentation, ReadPatches, iterate, training_batches
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, fit_preprocessing, scan_images
from pulmo_jax.data.scratch import DecodedReader
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step

HERE = Path(__file__).parent
SETUPS = ((64, 1, 64), (128, 3, 32))  # patch, channels, batch
NOISE, CELL, DECAY, RATE, CLIP = 0.2, 16, 0.99, 2e-3, 1.0


class Convolutions(torch.nn.Module):
    """ConvAutoencoder in PyTorch, with the weights of `model`; its layers as convolutions."""

    def __init__(self, model: ConvAutoencoder):
        super().__init__()
        self.strides, self.coarse = model.strides, model.coarse
        self.down, self.up = torch.nn.ModuleList(), torch.nn.ModuleList()
        for stride, down, up in zip(model.strides, model.down, model.up, strict=True):
            inputs, outputs = down.in_features // stride**2, down.out_features
            conv = torch.nn.Conv2d(inputs, outputs, stride, stride)
            kernel = np.array(down.kernel).reshape(stride, stride, inputs, outputs)  # rows, columns, channels
            conv.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
            conv.bias.data = torch.tensor(np.array(down.bias))
            self.down.append(conv)
            # depth_to_space gives every output pixel a bias of its own, which no ConvTranspose2d has
            transposed = torch.nn.ConvTranspose2d(outputs, inputs, stride, stride, bias=False)
            kernel = np.array(up.kernel).reshape(outputs, stride, stride, inputs)
            transposed.weight.data = torch.tensor(kernel.transpose(0, 3, 1, 2))
            bias = np.array(up.bias).reshape(stride, stride, inputs).transpose(2, 0, 1)
            transposed.register_parameter("pixel_bias", torch.nn.Parameter(torch.tensor(bias)))
            self.up.append(transposed)
        self.to_latent, self.from_latent = linear(model.to_latent), linear(model.from_latent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, P, P)"""
        for layer in self.down:
            x = functional.silu(layer(x))
        z = self.to_latent(x.permute(0, 2, 3, 1).flatten(1))
        x = functional.silu(self.from_latent(z)).unflatten(1, self.coarse).permute(0, 3, 1, 2)
        for i in reversed(range(len(self.up))):
            layer, x = self.up[i], self.up[i](x)
            x = x + layer.pixel_bias.repeat(1, x.shape[2] // self.strides[i], x.shape[3] // self.strides[i])
            x = functional.silu(x) if i else x
        return x


class Products(torch.nn.Module):
    """The same as rearranged pixels and matrix products, as our own is."""

    def __init__(self, model: ConvAutoencoder):
        super().__init__()
        self.strides, self.coarse = model.strides, model.coarse
        self.down = torch.nn.ModuleList([linear(layer) for layer in model.down])
        self.up = torch.nn.ModuleList([linear(layer) for layer in model.up])
        self.to_latent, self.from_latent = linear(model.to_latent), linear(model.from_latent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P, P, C)"""
        for stride, layer in zip(self.strides, self.down, strict=True):
            b, h, w, c = x.shape
            x = x.reshape(b, h // stride, stride, w // stride, stride, c).permute(0, 1, 3, 2, 4, 5).flatten(3)
            x = functional.silu(layer(x))
        x = functional.silu(self.from_latent(self.to_latent(x.flatten(1)))).unflatten(1, self.coarse)
        for i in reversed(range(len(self.up))):
            stride, x = self.strides[i], self.up[i](x)
            b, h, w, c = x.shape
            x = x.reshape(b, h, w, stride, stride, c // stride**2).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(b, h * stride, w * stride, c // stride**2)
            x = functional.silu(x) if i else x
        return x


def linear(layer: nnx.Linear) -> torch.nn.Linear:
    made = torch.nn.Linear(layer.in_features, layer.out_features)
    made.weight.data, made.bias.data = torch.tensor(np.array(layer.kernel).T), torch.tensor(np.array(layer.bias))
    return made


def torch_step(network: torch.nn.Module, batch: np.ndarray, channels_first: bool) -> Callable[[], None]:
    data = torch.tensor(batch)
    data = data.permute(0, 3, 1, 2).contiguous() if channels_first else data
    size, channels = batch.shape[1], batch.shape[3]
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4, foreach=True)
    average = [p.detach().clone() for p in parameters]

    def step() -> None:
        grid = torch.randn(len(data), channels, -(-size // CELL), -(-size // CELL))
        noise = functional.interpolate(grid, size=(size, size), mode="bilinear")
        noise = noise if channels_first else noise.permute(0, 2, 3, 1)
        optimizer.zero_grad(set_to_none=True)
        loss = functional.mse_loss(network(data + NOISE * noise), data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)
        loss.item()

    return step


def jax_step(method: Autoencoder, batch: np.ndarray) -> tuple[Callable[[], None], float]:
    """The step, and its floating-point operations as XLA counts them."""
    optimizer = adamw(steps=10_000, learning_rate=RATE)
    step, state, data = make_step(method, optimizer, DECAY, 0), init_state(method, optimizer), jnp.asarray(batch)
    program = step.lower(state, data).compile()

    def run() -> None:
        nonlocal state
        state, info = program(state, data)
        float(info["loss"])

    return run, program.cost_analysis()["flops"]


def require_same(model: ConvAutoencoder, batch: np.ndarray) -> None:
    expected = np.asarray(model(jnp.asarray(batch)))
    with torch.no_grad():
        first = Convolutions(model)(torch.tensor(batch).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        second = Products(model)(torch.tensor(batch)).numpy()
    for found in (first, second):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def interleaved(steps: dict[str, Callable[[], None]], rounds: int, each: int = 5) -> dict[str, list[float]]:
    """ms of a step, the mean of `each` in a row, for every round; in another order every round."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds):
        names = list(steps)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(timed(lambda name=name: [steps[name]() for _ in range(each)]) / each)
    return times


def matmul_gflops(rounds: int) -> float:
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    return 2 * 2048**3 / min(timed(lambda: product(a).block_until_ready()) for _ in range(rounds)) / 1e6


def beside_torch(patch: int, channels: int, batch: int, rounds: int) -> dict[str, Any]:
    model = ConvAutoencoder(patch_size=patch, channels=channels, rngs=nnx.Rngs(0))
    data = np.random.default_rng(0).random((batch, patch, patch, channels), np.float32)
    require_same(model, data)
    ours, flops = jax_step(Autoencoder(model, noise_sigma=NOISE, noise_cell_px=CELL), data)
    times = interleaved(
        {
            "pulmo_jax": ours,
            "PyTorch, convolutions": torch_step(Convolutions(model), data, channels_first=True),
            "PyTorch, products": torch_step(Products(model), data, channels_first=False),
        },
        rounds,
    )
    median = {name: float(np.median(values)) for name, values in times.items()}
    peer = min(value for name, value in median.items() if name != "pulmo_jax")
    return {
        "setup": f"{batch} patches of {patch}x{patch}x{channels}",
        "ms": median,
        "spread_ms": {name: [float(np.min(v)), float(np.max(v))] for name, v in times.items()},
        "ratio_to_faster_torch": median["pulmo_jax"] / peer,
        "gflop": flops / 1e9,
    }


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.random((32, 32, 3)).repeat(16, axis=0).repeat(16, axis=1)
        image = (200 * coarse + 20 * rng.random(coarse.shape)).astype(np.uint8)
        tifffile.imwrite(folder / f"{i:04d}.tif", image, photometric="rgb", compression="zlib", rowsperstrip=64)


def pipeline(patch: int, batch: int, rounds: int, steps: int = 30) -> dict[str, Any]:
    """ms of a step of the loop, as training runs it: the next batch is asked for while the step computes."""
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), 300)
        refs, _ = index_images(Path(name))
        reader, sampling = Reader(), Sampling(patch, patch // 2, 0.25, None, resize=False)
        scan = scan_images(refs, sampling, reader)
        how = fit_preprocessing(scan, sampling, "percentile", None, (0.1, 99.9), (-1.0, 2.0))
        read = ReadPatches(scan.images, how, DecodedReader(reader, scan.images, 8192, Path(name)))
        dataset = training_batches(scan.cells, read, Augmentation(patch // 4), batch_size=batch, seed=0)
        method, optimizer = (
            Autoencoder(ConvAutoencoder(patch_size=patch, channels=3, rngs=nnx.Rngs(0))),
            adamw(steps=9999),
        )
        step, state = make_step(method, optimizer, DECAY, 0), init_state(method, optimizer)
        state, _ = step(state, dataset[0])

        def loop(batches: Iterator[Any]) -> float:
            nonlocal state
            upcoming, began = next(batches), time.perf_counter()
            for _ in range(steps):
                state, info = step(state, upcoming)
                upcoming = next(batches)
                float(info["loss"])
            return 1000 * (time.perf_counter() - began) / steps

        with closing(iterate(dataset, 0, threads=4, prefetch=8)) as real:
            for _ in range(20):
                next(real)
            times = {"one repeated batch": [], "the real pipeline": []}
            for _ in range(rounds):
                times["one repeated batch"].append(loop(itertools.repeat(dataset[0])))
                times["the real pipeline"].append(loop(real))
        reading = [timed(lambda k=k: dataset[k]) for k in range(40, 50)]
    median = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "setup": f"{batch} patches of {patch}x{patch}x3 from 300 TIFFs of 512x512x3, deflate",
        "ms": median,
        "ratio": median["the real pipeline"] / median["one repeated batch"],
        "reading_ms_of_one_core": float(np.median(reading)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(os.cpu_count() or 1)
    limit = matmul_gflops(rounds)
    rows = [beside_torch(*setup, rounds) for setup in SETUPS]
    for row in rows:
        row["share_of_matmul"] = row["gflop"] / (row["ms"]["pulmo_jax"] / 1000) / limit
    fed = [pipeline(64, 64, rounds), pipeline(128, 32, rounds)]
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, PyTorch {torch.__version__}"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {versions}"
    result = {"machine": machine, "matmul_gflops": limit, "rounds": rounds, "step": rows, "pipeline": fed}
    (HERE / "train_step.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        f"`python experiments/benchmarks/train_step.py --rounds {rounds}`: {machine}; a float32 matrix product reaches "
        f"{limit:.0f} GFLOP/s in the same run. Medians in ms per step (lowest to highest round).\n",
        "| step | pulmo_jax | PyTorch, convolutions | PyTorch, products | ratio to the faster | GFLOP | "
        "fraction of the product's rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row['ms'][n]:.1f} ({low:.1f} to {high:.1f})" for n, (low, high) in row["spread_ms"].items()]
        lines.append(
            f"| {row['setup']} | {' | '.join(cells)} | {row['ratio_to_faster_torch']:.2f} | {row['gflop']:.2f} | "
            f"{row['share_of_matmul']:.0%} |"
        )
    lines += [
        "",
        "| loop | one repeated batch | full pipeline | ratio | reading a batch on one core |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['setup']} | {row['ms']['one repeated batch']:.1f} | {row['ms']['the real pipeline']:.1f} | "
        f"{row['ratio']:.2f} | {row['reading_ms_of_one_core']:.1f} |"
        for row in fed
    ]
    (HERE / "train_step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
