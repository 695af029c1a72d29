"""Training step of the autoencoder with different layers, interleaved in one run.

    python experiments/benchmarks/layers.py [--repeats 15]

Writes layers.json and layers.md beside this file. Depth, widths and bottleneck are equal; the layers differ in how they
halve or double the image. FLOPs are counted by XLA for the whole step (forward, backward, update), and compared with
the rate of a float32 matrix product of 2048x2048 measured in the same run.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pulmo_jax.models.autoencoder import ConvAutoencoder

HERE = Path(__file__).parent
WIDTHS, LATENT = (32, 64, 128), 64


def space_to_depth(x: jax.Array, factor: int) -> jax.Array:
    """Blocks of factor x factor pixels become channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of space_to_depth."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * factor, w * factor, c // factor**2)


class Mixed(nnx.Module):
    """ConvAutoencoder's layers, each followed by a residual 3x3 convolution at its scale."""

    def __init__(self, patch: int, channels: int, rngs: nnx.Rngs):
        self.plain = ConvAutoencoder(patch_size=patch, channels=channels, latent=LATENT, width=WIDTHS[0], rngs=rngs)
        self.mix_down = nnx.List([nnx.Conv(n, n, (3, 3), rngs=rngs) for n in self.plain.features])
        self.mix_up = nnx.List([nnx.Conv(n, n, (3, 3), rngs=rngs) for n in self.plain.features])

    def __call__(self, x: jax.Array) -> jax.Array:
        plain = self.plain
        for stride, layer, mix in zip(plain.strides, plain.down, self.mix_down, strict=True):
            x = nnx.silu(layer(space_to_depth(x, stride)))
            x = x + nnx.silu(mix(x))
        x = plain.to_latent(x.reshape(x.shape[0], -1))
        x = nnx.silu(plain.from_latent(x)).reshape(-1, *plain.coarse)
        for i in reversed(range(len(plain.strides))):
            x = x + nnx.silu(self.mix_up[i](x))
            x = depth_to_space(plain.up[i](x), plain.strides[i])
            x = nnx.silu(x) if i else x
        return x


class Strided(nnx.Module):
    """The usual stride-2 3x3 convolutions; the decoder doubles by depth-to-space or by a transposed convolution."""

    def __init__(self, patch: int, channels: int, rngs: nnx.Rngs, transposed: bool):
        chain = (channels, *WIDTHS)
        self.transposed, self.side = transposed, patch // 8
        self.down = nnx.List([nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in itertools.pairwise(chain)])
        up = [
            nnx.ConvTranspose(b, a, (3, 3), strides=(2, 2), rngs=rngs)
            if transposed
            else nnx.Conv(b, 4 * a, (3, 3), rngs=rngs)
            for a, b in itertools.pairwise(chain)
        ]
        self.up = nnx.List(up[::-1])
        size = self.side**2 * WIDTHS[-1]
        self.to_latent, self.from_latent = nnx.Linear(size, LATENT, rngs=rngs), nnx.Linear(LATENT, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.down:
            x = nnx.silu(layer(x))
        x = self.to_latent(x.reshape(x.shape[0], -1))
        x = nnx.silu(self.from_latent(x)).reshape(-1, self.side, self.side, WIDTHS[-1])
        for i, layer in enumerate(self.up):
            x = layer(x) if self.transposed else depth_to_space(layer(x), 2)
            x = nnx.silu(x) if i < len(WIDTHS) - 1 else x
        return x


VARIANTS: dict[str, Callable] = {
    "kernel = stride (chosen)": lambda p, c, r: ConvAutoencoder(
        patch_size=p, channels=c, latent=LATENT, width=WIDTHS[0], rngs=r
    ),
    "kernel = stride, and residual 3x3": Mixed,
    "stride-2 3x3, depth-to-space": lambda p, c, r: Strided(p, c, r, transposed=False),
    "stride-2 3x3, transposed": lambda p, c, r: Strided(p, c, r, transposed=True),
}


def make_step(network: nnx.Module) -> tuple[Callable, tuple]:
    graph, params = nnx.split(network, nnx.Param)
    optimizer = optax.adamw(1e-3)

    def step(params, opt_state, batch):
        def loss(p):
            return jnp.mean((nnx.merge(graph, p)(batch) - batch) ** 2)

        gradient = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step), (params, optimizer.init(params))


def seconds(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def peak_flops(repeats: int) -> float:
    """float32 FLOP/s of a large matrix product here."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    seconds(product, a)
    return 2 * 2048**3 / min(seconds(product, a) for _ in range(repeats))


def measure(patch: int, channels: int, batch: int, repeats: int) -> list[dict]:
    images = jnp.asarray(np.random.default_rng(0).random((batch, patch, patch, channels), np.float32))
    compiled, rows = {}, []
    for name, build in VARIANTS.items():
        network = build(patch, channels, nnx.Rngs(0))
        step, state = make_step(network)
        start = time.perf_counter()
        program = step.lower(*state, images).compile()
        compile_s = time.perf_counter() - start
        flops = program.cost_analysis()["flops"]
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
        compiled[name] = (program, state)
        rows.append({"layers": name, "parameters": parameters, "gflop": flops / 1e9, "compile_s": compile_s, "ms": []})
        seconds(program, *state, images)
    for _ in range(repeats):  # interleaved, so that a busy moment hits all alike
        for row in rows:
            program, state = compiled[row["layers"]]
            row["ms"].append(1e3 * seconds(program, *state, images))
    for row in rows:
        row["ms"] = float(np.median(row["ms"]))
        row |= {"patch": patch, "channels": channels, "batch": batch}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    limit = peak_flops(repeats)
    rows = [row for setup in ((64, 1, 64), (128, 3, 32)) for row in measure(*setup, repeats)]
    for row in rows:
        row["share_of_matmul"] = row["gflop"] * 1e9 / (row["ms"] / 1e3) / limit
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
    }
    result = {"machine": machine, "matmul_gflops": limit / 1e9, "repeats": repeats, "rows": rows}
    (HERE / "layers.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        f"`python experiments/benchmarks/layers.py --repeats {repeats}` on {machine['device']}, jax {jax.__version__}; "
        f"a float32 matrix product reaches {limit / 1e9:.0f} GFLOP/s in the same run. Medians.\n",
        "| patch | batch | layers | parameters | GFLOP per step | ms per step | fraction of the product's rate | "
        "compile s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['patch']}x{r['patch']}x{r['channels']} | {r['batch']} | {r['layers']} | {r['parameters']:,} | "
            f"{r['gflop']:.2f} | {r['ms']:.0f} | {r['share_of_matmul']:.0%} | {r['compile_s']:.1f} |"
            for r in rows
        ),
    ]
    (HERE / "layers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
