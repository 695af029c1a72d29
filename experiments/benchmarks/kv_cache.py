"""Drawing a grid of 16 x 16 codes with the key-value cache and without it, in one run.

    python experiments/benchmarks/kv_cache.py [--rounds 3]

The transformer is that of configs/model/token_transformer.yaml with random weights; its speed does not depend on them.
With the cache, the 256 codes are drawn by `methods.tokens.replaced`, as `sample` does. Without it, every code takes a
teacher-forced pass over the codes before it: over all 256 places, or, faster, over their number rounded up to the next
multiple of 32, with one compiled program per length. All three draw the same codes from the same random numbers, which
is checked, and so are the logits. Time by position: 32 codes in a row from each position. Rounds are interleaved, and
minima are reported, which suffer least from other load. Writes kv_cache.json and kv_cache.md beside this file.
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
from flax import nnx

from pulmo_jax.methods.token_orders import token_orders
from pulmo_jax.methods.tokens import drawn, replaced
from pulmo_jax.models.token_transformer import TokenTransformer, before

HERE = Path(__file__).parent
SIDE, CODES, BLOCK = 16, 128, 32
STEPS = SIDE**2


def cached(network: TokenTransformer, draws: jax.Array, order: jax.Array) -> jax.Array:
    nothing = jnp.zeros(draws.shape, jnp.int32)
    return replaced(network, nothing, order, -jnp.inf, draws, 1.0)[0][:, order]


def uncached(network: TokenTransformer, draws: jax.Array, order: jax.Array, block: int) -> jax.Array:
    """Draw with one pass per code over a prefix whose length is a multiple of `block`."""
    sequence = jnp.zeros(draws.shape, jnp.int32)
    for end in range(block, STEPS + 1, block):

        def step(i: jax.Array, sequence: jax.Array, end: int = end) -> jax.Array:
            logits = network(sequence[:, :end], order[:end])[:, i]
            return sequence.at[:, i].set(drawn(logits, draws[:, i], 1.0))

        sequence = jax.lax.fori_loop(end - block, end, step, sequence)
    return sequence


def all_logits(network: TokenTransformer, sequence: jax.Array, order: jax.Array) -> jax.Array:
    """Logits of cached steps."""

    def step(cache: Any, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        logits, cache = network.step(*now, cache)
        return cache, logits

    read = jnp.concatenate([jnp.full((len(sequence), 1), CODES), sequence[:, :-1]], axis=1)
    steps = read.T, before(order), order
    return jax.lax.scan(step, network.init_cache(len(sequence)), steps)[1].swapaxes(0, 1)


def run_of(network: TokenTransformer, cache: Any, first: jax.Array, order: jax.Array) -> Any:
    """`BLOCK` cached steps from a position."""
    token = jnp.zeros(cache.keys[0].shape[0], jnp.int32)

    def step(i: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        logits, cache = network.step(token, order[i - 1], order[i], carry[0])
        return cache, carry[1] + logits

    total = jnp.zeros((len(token), CODES))
    return jax.lax.fori_loop(first, first + BLOCK, step, (cache._replace(length=first), total))


def timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def fastest(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: min(values) for name, values in times.items()}


def measured(batch: int, rounds: int) -> dict[str, Any]:
    model = TokenTransformer(patch_size=64, channels=1, rngs=nnx.Rngs(0), codes=CODES, code_side=SIDE)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    order = jnp.asarray(token_orders(["raster"], SIDE)[0])
    draws = jax.random.uniform(jax.random.key(0), (batch, STEPS))

    def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        program = jax.jit(lambda params, *rest_of: function(nnx.merge(graph, params, rest), *rest_of))
        return lambda: program(params, *arguments)

    ways = {
        "cache": compiled(cached, draws, order),
        "no cache, all places": compiled(lambda n, d, o: uncached(n, d, o, STEPS), draws, order),
        "no cache, prefix": compiled(lambda n, d, o: uncached(n, d, o, BLOCK), draws, order),
    }
    codes = {name: np.asarray(way()) for name, way in ways.items()}
    equal = {name: float((found == codes["cache"]).mean()) for name, found in codes.items()}
    sequence = jnp.asarray(codes["cache"])
    both = (np.asarray(compiled(f, sequence, order)()) for f in (all_logits, lambda n, s, o: n(s, o)))
    program = jax.jit(lambda params, cache, first: run_of(nnx.merge(graph, params, rest), cache, first, order))
    cache = model.init_cache(batch)
    positions = {str(f): (lambda f=f: program(params, cache, jnp.asarray(f))) for f in range(0, STEPS, BLOCK)}
    return {
        "batch": batch,
        "seconds": fastest(ways, rounds),
        "equal_codes": equal,
        "largest_difference_of_logits": float(np.abs(np.subtract(*both)).max()),
        "ms_per_code_from_position": {k: 1e3 * v / BLOCK for k, v in fastest(positions, 3 * rounds).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rows = [measured(batch, rounds) for batch in (1, 4)]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
    (HERE / "kv_cache.json").write_text(
        json.dumps({"machine": machine, "rounds": rounds, "rows": rows}, indent=2) + "\n"
    )
    lines = [
        f"`python experiments/benchmarks/kv_cache.py --rounds {rounds}`: {machine}. Seconds for 256 codes of each "
        "of the patches, fastest of the rounds.\n",
        "| patches | cache | no cache, prefix | no cache, all places | prefix / cache | equal codes | "
        "largest difference of logits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        s = row["seconds"]
        lines.append(
            f"| {row['batch']} | {s['cache']:.2f} | {s['no cache, prefix']:.1f} | {s['no cache, all places']:.1f} | "
            f"{s['no cache, prefix'] / s['cache']:.0f} | {min(row['equal_codes'].values()):.2%} | "
            f"{row['largest_difference_of_logits']:.1e} |"
        )
    places = list(rows[0]["ms_per_code_from_position"])
    lines += [
        "",
        "Milliseconds per code with the cache, by the position of the first of 32 codes:\n",
        f"| patches | {' | '.join(places)} |",
        "| --- |" + " --- |" * len(places),
    ]
    lines += [
        f"| {row['batch']} | {' | '.join(f'{ms:.2f}' for ms in row['ms_per_code_from_position'].values())} |"
        for row in rows
    ]
    (HERE / "kv_cache.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
