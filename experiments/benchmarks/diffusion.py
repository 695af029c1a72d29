"""Diffusion: the training step compared with the same network in PyTorch, and samplers compared on the sample CT.

    python experiments/benchmarks/diffusion.py [--rounds 9]      # training step; needs PyTorch, in the same environment
    python experiments/benchmarks/diffusion.py --run RUN         # samplers; RUN of train +experiment=lung_diffusion

The training step: both draw steps and Gaussian noise, estimate the clean patch with an absolute loss, and do backward,
clipping, AdamW and the moving average in float32. The weights are those of the JAX network, and outputs and losses must
agree before anything is timed. See segmentation.py in this folder for the way of timing and the limit.

Samplers: every test slice is scored with the parameters of the run, one draw for each patch, by each sampler; AP is
that of all pixels in the lungs.

Writes diffusion.json and diffusion.md beside this file; each part keeps the other's results.
"""

import argparse
import dataclasses
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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads
from pulmo_jax.host.resources import keep_freed_memory
from pulmo_jax.methods.diffusion import Diffusion
from pulmo_jax.methods.diffusion_schedules import amplitudes
from pulmo_jax.methods.losses import l1
from pulmo_jax.models.image_unet import LONGEST_PERIOD, TIME_STEPS, ImageUNet
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step

HERE = Path(__file__).parent
SETUPS = ((64, 1, 64, 16), (64, 1, 32, 32))  # patch, channels, batch, features of the first scale
DEPTH = 250  # of AnoDDPM, with all of its noise
SAMPLERS = (("ddpm", 250), ("ddpm", 10), ("ddim", 10), ("dpm_solver", 10), ("dpm_solver", 5))


# --- the same network in PyTorch


def torch_network(model: ImageUNet, same: bool) -> Any:
    """models.image_unet.ImageUNet in PyTorch, with the weights of `model`; `same`: see segmentation.Network."""
    import torch
    from segmentation import conv, group_norm
    from torch.nn import functional

    every = torch.nn.ModuleList

    def linear(layer: nnx.Linear) -> torch.nn.Linear:
        made = torch.nn.Linear(layer.in_features, layer.out_features)
        made.weight.data, made.bias.data = (torch.tensor(np.array(a)) for a in (layer.kernel[...].T, layer.bias[...]))
        return made

    class Block(torch.nn.Module):
        def __init__(self, block: Any):
            super().__init__()
            self.norms, self.convs = every(map(group_norm, block.norms)), every(map(conv, block.convs))
            self.film = every(map(linear, block.film))

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            y = x
            for norm, layer, film in zip(self.norms, self.convs, self.film, strict=True):
                scale, shift = film(time)[..., None, None].chunk(2, 1)
                y = layer(functional.relu(norm(y) * (1 + scale) + shift, inplace=True))
            return x + y

    class Attention(torch.nn.Module):
        def __init__(self, layer: Any):
            super().__init__()
            self.heads, self.norm = layer.heads, group_norm(layer.norm)
            self.inputs, self.output = linear(layer.inputs), linear(layer.output)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, features = x.shape[:2]
            cells = self.norm(x).flatten(2).transpose(1, 2)
            inputs = self.inputs(cells).reshape(batch, -1, 3, self.heads, features // self.heads).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*inputs).transpose(1, 2).reshape(cells.shape)
            return x + self.output(mixed).transpose(1, 2).reshape(x.shape)

    class Scale(torch.nn.Module):
        def __init__(self, scale: Any):
            super().__init__()
            self.block, self.attention = Block(scale.block), every(map(Attention, scale.attention))

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            x = self.block(x, time)
            for attention in self.attention:
                x = attention(x)
            return x

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = model.stem
            self.embed, self.first = every(map(linear, model.embed)), conv(model.first, blocks=model.stem**2)
            self.down = every([conv(layer, stride=2, padding=0 if same else 1) for layer in model.down])
            self.up, self.last = every(map(conv, model.up)), group_norm(model.last)
            self.encoder, self.decoder = every(map(Scale, model.encoder)), every(map(Scale, model.decoder))
            split, head = linear(model.head.split), conv(model.head.conv)
            outputs = (
                split.out_features // self.side**2
            )  # features_to_blocks has the features last, pixel_shuffle first
            order = np.arange(split.out_features).reshape(-1, outputs).T.ravel()
            self.split = torch.nn.Conv2d(split.in_features, split.out_features, 1)
            self.split.weight.data = split.weight.data[order][..., None, None]
            self.split.bias.data = split.bias.data[order]
            self.head = torch.nn.Conv2d(outputs, head.out_channels, 3, padding=1)
            self.head.weight.data, self.head.bias.data = head.weight.data, torch.tensor(np.array(model.head.bias[...]))
            half = self.embed[0].in_features // 2
            self.frequencies = torch.exp(-np.log(LONGEST_PERIOD) * torch.arange(half) / half)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            """(B, C, P, P), (B,)"""
            phase = TIME_STEPS * time[:, None] * self.frequencies
            embedded = torch.cat([phase.cos(), phase.sin()], 1)
            for layer in self.embed:
                embedded = functional.silu(layer(embedded))
            x = self.encoder[0](self.first(functional.pixel_unshuffle(x, self.side)), embedded)
            skips = [x]
            for down, scale in zip(self.down, self.encoder[1:], strict=True):
                x = scale(down(functional.pad(x, (0, 1, 0, 1)) if same else x), embedded)
                skips.append(x)
            for skip, up, scale in reversed(list(zip(skips, self.up, self.decoder, strict=False))):
                x = scale(skip + functional.interpolate(up(x), scale_factor=2.0, mode="bilinear"), embedded)
            pixels = functional.pixel_shuffle(self.split(functional.relu(self.last(x), inplace=True)), self.side)
            return self.head(functional.relu(pixels, inplace=True))

    return Network()


def torch_step(network: Any, batch: np.ndarray, layout: Any, compiled: bool) -> Callable[[], None]:
    """Training step in PyTorch."""
    import torch
    from segmentation import CLIP, DECAY, RATE

    network = network.to(memory_format=layout)
    patches = torch.tensor(batch).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    forward = torch.compile(network) if compiled else network
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4, foreach=True)
    average = [p.detach().clone() for p in parameters]
    alphas, sigmas = (torch.tensor(a, dtype=torch.float32) for a in amplitudes("linear", 1000))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        steps = torch.randint(1, 1001, (len(patches),))
        alpha, sigma = (table[steps][:, None, None, None] for table in (alphas, sigmas))
        clean = (patches - patches.mean()) / patches.std()
        noisy = alpha * clean + sigma * torch.randn_like(clean)
        loss = (forward(noisy, steps / 1000) - clean).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)
        loss.item()

    return step


def jax_step(method: Diffusion, batch: np.ndarray) -> tuple[Callable[[], None], Any]:
    """Training step, with its compiled program."""
    from segmentation import CLIP, DECAY, RATE

    optimizer, data = adamw(steps=10_000, learning_rate=RATE, clip_norm=CLIP), jnp.asarray(batch)
    state: Any = init_state(method, optimizer)
    program = make_step(method, optimizer, DECAY, 0).lower(state, data).compile()

    def step() -> None:
        nonlocal state
        state, info = program(state, data)
        float(info["loss"])

    return step, program


def require_same(model: ImageUNet, batch: np.ndarray) -> None:
    """Check that both networks return the same, with random numbers in the layers that start as zeros."""
    import torch

    graph, params = nnx.split(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [p + 0.05 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    model, times = nnx.merge(graph, jax.tree.unflatten(tree, drawn)), np.linspace(0, 1, len(batch), dtype=np.float32)
    expected = np.asarray(model(jnp.asarray(batch), jnp.asarray(times)))
    network = torch_network(model, same=True)
    with_norms(network, model)
    with torch.no_grad():
        found = network(torch.tensor(batch).permute(0, 3, 1, 2), torch.tensor(times)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())


def with_norms(network: Any, model: ImageUNet) -> None:
    """Copy scales and biases of the normalisations, which segmentation.group_norm leaves at 1 and 0."""
    import torch

    def copy(made: Any, norm: Any) -> None:
        made.weight.data, made.bias.data = (torch.tensor(np.array(p[...])) for p in (norm.scale, norm.bias))

    copy(network.last, model.last)
    for ours, theirs in ((model.encoder, network.encoder), (model.decoder, network.decoder)):
        for scale, made in zip(ours, theirs, strict=True):
            for norm, other in zip(scale.block.norms, made.block.norms, strict=True):
                copy(other, norm)
            for attention, other in zip(scale.attention, made.attention, strict=True):
                copy(other.norm, attention.norm)


def training_rows(rounds: int, compiled: bool) -> dict[str, Any]:
    """Times of the training step."""
    import torch
    from segmentation import OURS, interleaved, rates, summary

    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    limits, rows = rates(rounds), []
    for patch, channels, size, width in SETUPS:
        batch = np.random.default_rng(0).random((size, patch, patch, channels), np.float32)
        model = ImageUNet(patch_size=patch, channels=channels, rngs=nnx.Rngs(0), width=width, timed=True)
        require_same(model, batch[:4])
        runs: dict[str, Callable] = {}
        programs = {}
        for noise, name in (("gaussian", OURS), ("simplex", f"{OURS}, simplex noise")):
            runs[name], programs[name] = jax_step(Diffusion(model, loss=l1, noise=noise), batch)
        variants = [("channels last", torch.channels_last, False), ("channels first", torch.contiguous_format, False)]
        for kind, layout, through in [*variants, *([("compiled", torch.channels_last, True)] if compiled else [])]:
            runs[f"PyTorch, {kind}"] = torch_step(torch_network(model, same=False), batch, layout, through)
        times = interleaved(runs, rounds)
        simplex = times.pop(f"{OURS}, simplex noise")
        task = f"training step, {size} patches of {patch}x{patch}x{channels}, width {width}"
        row = summary(task, times, programs[OURS], limits)
        ours = np.median(simplex[:, 1] / times[OURS][:, 1])
        rows.append(row | {"simplex_to_gaussian_cpu": float(ours)})
    return {"matmul_gflop_per_cpu_s": limits[0], "torch": torch.__version__, "rounds": rounds, "rows": rows}


# --- samplers on the sample CT


def sampler_rows(path: Path) -> dict[str, Any]:
    """AP and cost of each sampler with the parameters of a run."""
    from sklearn.metrics import average_precision_score

    from pulmo_jax.data.images import index_images
    from pulmo_jax.data.reader import Reader
    from pulmo_jax.inference.score import Scorer, Tiles
    from pulmo_jax.tasks.anomalies.run import open_run

    run = open_run(path)
    data, scorer = run.config.data, run.scorer
    reader = Reader(data.max_image_mb)
    refs = index_images(data.test, masks=data.foreground)[0]
    truths = {ref.name: reader.image(ref_of(ref, data.test_masks))[..., 0] > 0 for ref in refs}
    rows = []
    for sampler, calls in SAMPLERS:
        method = dataclasses.replace(scorer.method, sampler=sampler, calls=calls, draws=1, depth=DEPTH, noise_share=1.0)
        other = Scorer.of(method, scorer.params, scorer.how, Tiles(0.0, 48))
        scores, labels = [], []
        warm = reader.image(refs[0])
        other(warm, reader.foreground(refs[0]))  # compiles
        cpu, wall = time.process_time(), time.perf_counter()
        for ref in refs:
            found = other(reader.image(ref), reader.foreground(ref), ref.scale)
            inside = np.isfinite(found)
            scores.append(found[inside])
            labels.append(truths[ref.name][inside])
        row = {
            "sampler": sampler,
            "calls": calls,
            "ap": float(average_precision_score(np.concatenate(labels), np.concatenate(scores))),
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
        }
        rows.append(row)
        print(row, flush=True)
    return {"depth": DEPTH, "target": scorer.method.target, "slices": len(refs), "rows": rows}


def ref_of(ref: Any, folder: Path) -> Any:
    """The image of the same name in another folder."""
    from pulmo_jax.data.images import index_images

    return next(other for other in index_images(folder)[0] if other.name == ref.name)


# --- pages


def page(result: dict[str, Any]) -> str:
    lines = []
    if "training" in result:
        training = result["training"]
        names = list(training["rows"][0]["ms"])
        lines += [
            f"`python experiments/benchmarks/diffusion.py --rounds {training['rounds']}`: {result['machine']}, PyTorch "
            f"{training['torch']}. Medians in ms (lowest to highest round); CPU: user and system time of all threads; "
            "ratios: medians over the rounds, to the fastest PyTorch.\n",
            f"| | {' | '.join(names)} | ratio | ratio of CPU time | simplex to Gaussian noise, CPU time | GFLOP |",
            f"|{' --- |' * (len(names) + 5)}",
        ]
        for row in training["rows"]:
            cells = [
                f"{row['ms'][n]:.0f} ({low:.0f} to {high:.0f}), CPU {row['cpu_ms'][n]:.0f}"
                for n, (low, high) in row["spread_ms"].items()
            ]
            lines.append(
                f"| {row['task']} | {' | '.join(cells)} | {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | "
                f"{row['simplex_to_gaussian_cpu']:.2f} | {row['gflop']:.1f} |"
            )
    if "samplers" in result:
        samplers = result["samplers"]
        first = samplers["rows"][0]
        lines += [
            f"\n`python experiments/benchmarks/diffusion.py --run RUN`: healing from step {samplers['depth']} of 1000, "
            f"one draw per patch, tiles without overlap, {samplers['slices']} test slices of the sample "
            "CT (one patient).\n",
            f"| sampler | calls | pixel AP | relative to {first['sampler']} in {first['calls']} | CPU s | each call |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['sampler']} | {r['calls']} | {r['ap']:.3f} | {r['ap'] / first['ap']:.3f} | {r['cpu_s']:.0f} | "
            f"{r['cpu_s'] / r['calls']:.2f} |"
            for r in samplers["rows"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--run", type=Path, help="run of train +experiment=lung_diffusion")
    given = parser.parse_args()
    written = HERE / "diffusion.json"
    result = json.loads(written.read_text()) if written.exists() else {}
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    result["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, {versions}"
    if given.run is None:
        result["training"] = training_rows(given.rounds, given.compiled)
    else:
        result["samplers"] = sampler_rows(given.run)
    written.write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "diffusion.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
