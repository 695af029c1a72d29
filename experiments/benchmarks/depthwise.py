"""Depthwise convolutions of EfficientNet-Lite0 by XLA and as shifted products, and the whole encoder, in one run.

    python experiments/benchmarks/depthwise.py [--rounds 5]        # 4 minutes on two quiet cores

Times are the smallest CPU time (all threads) of the rounds, which alternate between the two. The gradient is of both
arguments, for a given gradient of the result. The limit is the rate of a product of two 1024 x 1024 matrices in float32
in the same run. Writes depthwise.json and depthwise.md beside this file.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from pulmo_jax.models.depthwise import shifted_products
from pulmo_jax.models.efficientnet_lite import BLOCKS, COUNT, EfficientNetLite0, shapes_of

HERE = Path(__file__).parent
SIDE, BATCH = 224, 8
Call = Callable[[], Any]


def xla(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


def cpu_ms(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Smallest CPU time of each call in ms; all calls once per round, after one call to compile."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            jax.block_until_ready(call())
            best[name] = min(best[name], 1e3 * (time.process_time() - began))
    return best


def layers() -> list[dict[str, int]]:
    """Distinct depthwise layers of the encoder, with the number of each."""
    side, found = SIDE // 2, {}
    for part in BLOCKS:
        for inputs, _, expansion, size, stride in shapes_of(part):
            key = (side, inputs * expansion, size, stride)
            found[key] = found.get(key, 0) + 1
            side //= stride
    names = ("side", "features", "size", "stride")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in found.items()]


def of_layer(layer: dict[str, int], rounds: int) -> dict[str, float]:
    """CPU time of one layer, forward and gradient, by both."""
    side, features, size, stride = (layer[name] for name in ("side", "features", "size", "stride"))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, side, side, features))
    kernel = jax.random.normal(keys[1], (size, size, features))
    g = jax.random.normal(keys[2], (BATCH, side // stride, side // stride, features))
    calls: dict[str, Call] = {}
    for name, function in (("xla", xla), ("shifted", shifted_products)):
        forward = jax.jit(partial(function, stride))
        gradient = jax.jit(lambda x, kernel, g, f=function: jax.vjp(partial(f, stride), x, kernel)[1](g))
        calls |= {f"{name} forward": partial(forward, x, kernel), f"{name} gradient": partial(gradient, x, kernel, g)}
    return cpu_ms(calls, rounds)


def of_encoder(rounds: int) -> dict[str, float]:
    """CPU time and operations of the whole encoder, and of a product of matrices."""
    graph, state = nnx.split(EfficientNetLite0(channels=3, rngs=nnx.Rngs(0), head=True))
    x = jax.random.normal(jax.random.key(0), (BATCH, SIDE, SIDE, 3))

    def features(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).taps(x, [COUNT])[0].mean((1, 2))

    forward, gradient = jax.jit(features), jax.jit(jax.grad(lambda state: (features(state, x) ** 2).mean()))
    matrix = jax.random.normal(jax.random.key(1), (1024, 1024))
    product = jax.jit(lambda a: a @ a)
    found = cpu_ms(
        {
            "forward": partial(forward, state, x),
            "gradient": partial(gradient, state),
            "product": partial(product, matrix),
        },
        rounds,
    )
    return found | {"gflop": BATCH * gflop()}


def gflop() -> float:
    """Operations of the convolutions for one image, 10^9; a multiplication and an addition count as two."""
    side, total = SIDE // 2, (SIDE // 2) ** 2 * 9 * 3 * 32
    for part in BLOCKS:
        for inputs, outputs, expansion, size, stride in shapes_of(part):
            wide = inputs * expansion
            total += side**2 * inputs * wide * (expansion > 1)
            side //= stride
            total += side**2 * wide * (size**2 + outputs)
    return 2 * (total + side**2 * 320 * 1280) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = [layer | of_layer(layer, rounds) for layer in layers()]
    facts = {"cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    results = {"batch": BATCH, "layers": rows, "encoder": of_encoder(rounds), "rounds": rounds, **facts}
    (HERE / "depthwise.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "depthwise.md").write_text(page(results))
    print(page(results))


def page(results: dict[str, Any]) -> str:
    kinds = ("xla forward", "shifted forward", "xla gradient", "shifted gradient")
    lines = [
        f"`python experiments/benchmarks/depthwise.py --rounds {results['rounds']}`: {results['cores']} cores, jax "
        f"{results['jax']}, {results['batch']} images. CPU ms, the smallest of the rounds.",
        "",
        f"| depthwise layer | layers | {' | '.join(kinds)} |",
        "| --- " * 6 + "|",
    ]
    for row in results["layers"]:
        name = (
            f"{row['side']} × {row['side']} × {row['features']}, {row['size']} × {row['size']}, stride {row['stride']}"
        )
        lines.append(f"| {name} | {row['count']} | {' | '.join(f'{row[kind]:.1f}' for kind in kinds)} |")
    count = sum(row["count"] for row in results["layers"])
    total = [sum(row[kind] * row["count"] for row in results["layers"]) for kind in kinds]
    lines.append(f"| all | {count} | {' | '.join(f'{ms:.0f}' for ms in total)} |")
    of, rate = results["encoder"], 2 * 1024**3 / 1e6 / results["encoder"]["product"]
    speed = of["gflop"] / of["forward"] * 1e3
    lines += [
        "",
        f"The whole encoder with its head takes {of['forward']:.0f} ms forward ({of['gflop']:.1f} GFLOP: {speed:.0f} "
        f"GFLOP per CPU second, {speed / rate:.0%} of the {rate:.0f} of a matrix product) and {of['gradient']:.0f} ms "
        "with the gradient of all parameters.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
