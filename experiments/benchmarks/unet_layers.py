"""Training step of the U-Net with other layers that halve or double the resolution, interleaved in one run.

    python experiments/benchmarks/unet_layers.py [--rounds 9]

Widths and stages are equal. A step is forward, loss, backward and AdamW, without augmentation. Times are medians; CPU
time is that of all threads, which other programs on the machine disturb less than the wall time. Writes
unet_layers.json and unet_layers.md beside this file.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pulmo_jax.data.codes import Classes
from pulmo_jax.host.resources import keep_freed_memory
from pulmo_jax.methods.segmentation import SegmentationNetwork
from pulmo_jax.models.blocks import Conv
from pulmo_jax.models.unet import ConvEncoder, UNet, blocks_to_features, features_to_blocks
from pulmo_jax.training.state import init_state, make_step

HERE = Path(__file__).parent
SIZE, BATCH = 128, 8
STILL = {"rotation_deg": 0.0, "scale": 0.0, "aspect": 0.0, "shear": 0.0, "shift": 0.0, "contrast": 0.0,
         "brightness": 0.0, "gamma": 0.0, "noise": 0.0, "flips": "none"}  # fmt: skip


class Patchify(nnx.Module):
    """Product over blocks of 2 x 2 cells."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = Conv(4 * inputs, outputs, size=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(blocks_to_features(x, 2))


class Pool(nnx.Module):
    """Maximum of 2 x 2 cells, then a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.maximum(x[:, ::2], x[:, 1::2])
        return self.conv(jnp.maximum(x[:, :, ::2], x[:, :, 1::2]))


class Unpatchify(nnx.Module):
    """1 x 1 convolution to 2 x 2 cells each; its own upsampling."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = Conv(inputs, 4 * outputs, size=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return features_to_blocks(self.conv(x), 2)


class Nearest(nnx.Module):
    """1 x 1 convolution, then the nearest neighbour."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = (y := self.conv(x)).shape
        wide = jnp.broadcast_to(y[:, :, None, :, None], (batch, height, 2, width, 2, features))
        return wide.reshape(batch, 2 * height, 2 * width, features)


class Changed(UNet):
    """U-Net whose layers between the scales are replaced."""

    def __init__(self, *, down: Callable | None = None, up: Callable | None = None, rngs: nnx.Rngs, **options):
        super().__init__(rngs=rngs, **options)
        encoded, decoded = self.encoder.channels, self.decoder.channels
        if down is not None:
            self.encoder.down = nnx.List([down(a, b, rngs=rngs) for a, b in pairwise(encoded)])
        if up is not None:
            self.decoder.up = nnx.List([up(b, a, rngs=rngs) for a, b in pairwise(decoded)])


VARIANTS: dict[str, dict] = {
    "3x3 stride 2; 1x1 and bilinear (chosen)": {},
    "2x2 product; 1x1 and bilinear": {"down": Patchify},
    "maximum and 1x1; 1x1 and bilinear": {"down": Pool},
    "3x3 stride 2; 1x1 and nearest": {"up": Nearest},
    "3x3 stride 2; 1x1 to 2x2 cells": {"up": Unpatchify},
}


def step_of(width: int, layers: dict) -> Callable[[], None]:
    """A compiled training step with its own state and batch."""
    network = partial(Changed, encoder=partial(ConvEncoder, width=width), width=width, **layers)
    still: dict[str, Any] = STILL
    method = SegmentationNetwork(Classes(("class",), (1,)), SIZE, 1, network, **still)
    params, optimizer = method.init(jax.random.key(0)), optax.adamw(1e-3)

    class Started:
        """The method with these parameters, as `init_state` takes it."""

        def init(self):
            return params

        train_loss = staticmethod(method.train_loss)

    started: Any = Started()
    state, step = init_state(started, optimizer), make_step(started, optimizer, 0.99, 0)
    rng = np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.normal(size=(BATCH, SIZE, SIZE, 1)), jnp.float32),
        jnp.asarray(rng.integers(0, 2, (BATCH, SIZE, SIZE)), jnp.uint8),
    )
    box = [state]

    def run() -> None:
        box[0], metrics = step(box[0], batch)
        jax.block_until_ready(metrics)

    run()
    return run


def main() -> None:
    """Time the variants and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    rows = []
    for width in (16, 32):
        steps = {name: step_of(width, layers) for name, layers in VARIANTS.items()}
        times = {name: [] for name in steps}
        for _ in range(rounds):
            for name, run in steps.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
        for name, measured in times.items():
            wall_ms, cpu_ms = np.median(measured, axis=0)
            rows.append({"width": width, "layers": name, "wall_ms": round(wall_ms, 1), "cpu_ms": round(cpu_ms, 1)})
    (HERE / "unet_layers.json").write_text(json.dumps(rows, indent=1) + "\n")
    head = (
        f"`python experiments/benchmarks/unet_layers.py --rounds {rounds}`: {platform.machine()}, "
        f"jax {jax.__version__}, {BATCH} patches of {SIZE}x{SIZE}x1. Medians of a training step.\n\n"
        "| width | layers between the scales: down; up | ms | CPU ms |\n| --- | --- | --- | --- |\n"
    )
    lines = [f"| {r['width']} | {r['layers']} | {r['wall_ms']:.0f} | {r['cpu_ms']:.0f} |" for r in rows]
    (HERE / "unet_layers.md").write_text(head + "\n".join(lines) + "\n")
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main()
