"""Anomaly detection by healing: noise is added to a patch, and a diffusion model of normal patches removes it.

A network learns to denoise normal patches at every level of noise (Ho, Jain, Abbeel 2020, "Denoising diffusion
probabilistic models", NeurIPS). A patch is noised to the step `depth`, deep enough to hide an anomaly, and sampled back
to a clean one, which is its normal version; the difference is the score (Wyatt, Leach, Schmon, Willcocks 2022,
"AnoDDPM: anomaly detection with denoising diffusion probabilistic models using simplex noise", CVPR Workshops). With
simplex noise, the noise is strong at low frequencies too and hides large anomalies at a depth that keeps the normal
structure.

The steps of the process, the depth of healing and the number of calls of the network are separate settings, and the
network is always told the step at which the chain is. With `noise_share` below 1, the input has less noise than the
network is told: it removes parts of the patch itself as if they were noise, anomalies and some normal detail.
`reconstruct` returns the end of the whole chain of calls, the
mean over `draws`, never the estimate of a single call. Intensities are standardised to zero mean and unit variance by
the moments of the training patches, so that a depth hides the same contrast in standard deviations on any data.

Departures from AnoDDPM: several draws are averaged; fast samplers; the depth of healing and the noise that is added may
differ (`noise_share`: the anomaly itself acts as noise); sampling starts at the last step with a signal of amplitude
0.005, because the estimate of the clean patch from the noise divides the error of the network by that amplitude, which
is 5e-5 at the end of the cosine schedule; and by default the target is the clean patch with an
absolute loss, as in pDDPM (Behrendt et al. 2023, MIDL), and the score is the smoothed signed residual, squared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from pulmo_jax.core.simplex import simplex_noise
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.content_key import content_keys
from pulmo_jax.methods.diffusion_schedules import Schedule, amplitudes, descent
from pulmo_jax.methods.losses import ImageLoss, l1
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.reconstruction import RESIDUALS, Score, smoothed_score
from pulmo_jax.methods.samplers import COEFFICIENTS, Kind, run
from pulmo_jax.methods.score_maps import Extent, smoothing_radius
from pulmo_jax.types import ImageStatistic

Target = Literal["epsilon", "x0", "v"]
Noise = Literal["gaussian", "simplex"]
MOMENT_STEPS = 100  # training steps whose patches give mean and variance
LEAST_SD = 1e-3  # normalised intensity
LEAST_ALPHA = 0.005  # amplitude of the signal from which patches are drawn and healed


@dataclass(frozen=True)
class Diffusion:
    """Diffusion model of normal patches; implements Method and other protocols of methods.base.

    Attributes:
        network: Flax module with its initial parameters; maps (B, P, P, C) and times (B,), 0 to 1, to (B, P, P, C). Its
            attributes `patch_size` and `channels` are P and C.
        loss: Function of image= and reconstruction=, the target and the output of the network.

    Raises:
        ValueError: If the depth is beyond the schedule or its steps with a signal, or there are more calls than steps.
    """

    NETWORK: ClassVar[Mapping[str, int | bool]] = {"timed": True}
    frozen: ClassVar[tuple[str, ...]] = ("moments",)

    network: Any
    loss: ImageLoss = l1
    target: Annotated[
        Target,
        Field(description="output of the network: the noise, the clean patch, or v = alpha noise - sigma x0"),
    ] = "x0"
    schedule: Annotated[Schedule, Field(description="noise schedule")] = "linear"
    timesteps: Annotated[int, Field(ge=1, le=100_000, description="steps of the forward process")] = 1000
    noise: Annotated[Noise, Field(description="noise: independent per pixel, or simplex with octaves")] = "simplex"
    noise_cell_px: Annotated[float, Field(gt=0, description="scale of the first octave of simplex noise, px")] = 64.0
    octaves: Annotated[int, Field(ge=1, le=16, description="octaves of simplex noise")] = 6
    persistence: Annotated[
        float, Field(gt=0, le=1, description="amplitude of an octave relative to the one before")
    ] = 0.8
    depth: Annotated[int, Field(ge=1, description="step from which patches are healed, at most timesteps")] = 550
    noise_share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="amplitude of the noise that is added, relative to that of the step depth; below 1, the "
            "network is told more noise than there is",
        ),
    ] = 0.0
    sampler: Annotated[Kind, Field(description="sampler; dpm_solver: DPM-Solver++(2M)")] = "dpm_solver"
    calls: Annotated[int, Field(ge=1, description="network calls per healed patch and draw, at most depth")] = 3
    draws: Annotated[int, Field(ge=1, le=1000, description="healed versions to average per patch")] = 1
    sample_calls: Annotated[
        int,
        Field(ge=1, description="network calls per patch that is drawn from noise, at most the steps with a signal"),
    ] = 50
    score: Annotated[
        Score,
        Field(
            description="l2, l1, ssim, ms_ssim: the smoothed squared, absolute, SSIM or multi-scale SSIM residual; "
            "local_mean: the square of the smoothed signed residual"
        ),
    ] = "local_mean"
    smooth_px: Annotated[float, Field(ge=0, le=100, description="sigma of the Gaussian smoothing of the score, px")] = (
        4.0
    )
    image_statistic: ImageStatistic = "combined"
    seed: Annotated[int, Field(ge=0, description="seed of the noise at inference")] = 0

    def __post_init__(self) -> None:
        if self.depth > self.timesteps:
            raise ValueError(f"method.depth={self.depth}: is beyond the schedule, method.timesteps={self.timesteps}")
        last = self.last_step
        if self.depth > last:
            raise ValueError(
                f"method.depth={self.depth}: no signal is left at this step of the {self.schedule} schedule with "
                f"method.timesteps={self.timesteps}; give at most {last}"
            )
        if self.calls > self.depth:
            raise ValueError(f"method.calls={self.calls}: is above method.depth={self.depth}, the number of steps")
        if self.sample_calls > last:
            raise ValueError(
                f"method.sample_calls={self.sample_calls}: is above {last}, the number of steps with a signal at "
                f"method.timesteps={self.timesteps}"
            )

    # --- training

    def init(self) -> Params:
        """Copy the initial parameters of the network; the moments are set at the first step."""
        moments = {"steps": jnp.zeros(()), "mean": jnp.array(0.5), "square": jnp.array(0.5**2 + 0.25**2)}
        return {"network": initial_params(self.network), "moments": moments}

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean loss of the network's estimate at a random step for each patch."""
        step_key, noise_key = jax.random.split(key)
        steps = jax.random.randint(step_key, (len(batch),), 1, self.timesteps + 1)
        clean = standardised(batch, params["moments"])
        noise = self.draw_noise(jax.random.split(noise_key, len(batch)), batch.shape[1:])
        alpha, sigma = (jnp.asarray(a, jnp.float32)[steps][:, None, None, None] for a in self._amplitudes)
        target = {"epsilon": noise, "x0": clean, "v": alpha * noise - sigma * clean}[self.target]
        output = self._output(params, alpha * clean + sigma * noise, steps)
        return self.loss(image=target, reconstruction=output).mean()

    def loss_and_statistics(
        self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Compute the loss with the moments of the batch; see `methods.base.TracksStatistics`."""
        seen = {"mean": batch.mean(), "square": (batch**2).mean()}
        return self.train_loss(params | {"moments": tracked(params["moments"], seen)}, batch, key), seen

    def update_statistics(self, params: Params, seen: dict[str, Array]) -> Params:
        """Average the moments of the first `MOMENT_STEPS` batches; see `methods.base.TracksStatistics`."""
        return params | {"moments": tracked(params["moments"], seen)}

    def draw_noise(self, keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B P P C"]:
        """Draw noise of unit variance.

        Args:
            keys: One key per patch.
            shape: Shape (P, P, C) of a patch.
        """
        if self.noise == "gaussian":
            return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

        def band(key: Array) -> Array:
            return simplex_noise(key, shape[0], shape[1], self.noise_cell_px, self.octaves, self.persistence)

        def one(key: Array) -> Array:
            return jax.vmap(band, out_axes=-1)(jax.random.split(key, shape[2]))

        return jax.vmap(one)(keys)

    @property
    def last_step(self) -> int:
        """Last step whose signal has at least the amplitude `LEAST_ALPHA`; patches are drawn from there."""
        return int(np.nonzero(self._amplitudes[0] >= LEAST_ALPHA)[0][-1])

    @property
    def _amplitudes(self) -> tuple[np.ndarray, np.ndarray]:
        return amplitudes(self.schedule, self.timesteps)

    def _output(self, params: Params, noisy: Array, steps: Int[Array, "B"]) -> Float[Array, "B P P C"]:
        return with_params(self.network, params["network"])(noisy, steps / self.timesteps)

    # --- sampling

    def estimate_clean(
        self, params: Params, noisy: Float[Array, "B P P C"], step: Int[Array, ""]
    ) -> Float[Array, "B P P C"]:
        """Estimate clean patches from patches with the noise of a step, both standardised, by a call of the network.

        Args:
            params: Parameters.
            noisy: Noisy patches.
            step: Step of the forward process, 1 to `timesteps`.

        Returns:
            The mean of the clean patches, given the noisy ones.
        """
        alpha, sigma = (jnp.asarray(a, jnp.float32)[step] for a in self._amplitudes)
        output = self._output(params, noisy, jnp.full(len(noisy), step))
        match self.target:
            case "epsilon":
                return (noisy - sigma * output) / alpha
            case "v":
                return alpha * noisy - sigma * output
        return output

    def _descend(
        self, params: Params, start: Float[Array, "B P P C"], keys: Key[Array, "B"], depth: int, calls: int
    ) -> Float[Array, "B P P C"]:
        """Sample from the step `depth` to clean patches; all standardised."""
        steps = descent(depth, calls)
        alpha, sigma = (a[steps] for a in self._amplitudes)
        numbers = jnp.asarray(steps)

        def noise_of(number: Array) -> Array:
            return self.draw_noise(jax.vmap(lambda key: jax.random.fold_in(key, number))(keys), start.shape[1:])

        def clean_of(noisy: Array, number: Array) -> Array:
            return self.estimate_clean(params, noisy, numbers[number])

        return run(COEFFICIENTS[self.sampler](alpha, sigma), clean_of, noise_of, start)

    def heal(self, params: Params, patches: Float[Array, "B P P C"], keys: Key[Array, "B"]) -> Float[Array, "B P P C"]:
        """Add the noise of the step `depth` to patches and sample back to clean ones.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.
            keys: One key per patch.

        Returns:
            One healed version of each patch, normalised intensities.
        """
        pairs = jax.vmap(jax.random.split)(keys)
        alpha, sigma = (float(a[self.depth]) for a in self._amplitudes)
        noise = self.draw_noise(pairs[:, 0], patches.shape[1:])
        start = alpha * standardised(patches, params["moments"]) + self.noise_share * sigma * noise
        healed = self._descend(params, start, pairs[:, 1], self.depth, self.calls)
        return restored(healed, params["moments"])

    def healed_moments(
        self, params: Params, patches: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B P P C"], Float[Array, "B P P C"]]:
        """Mean and standard deviation of the `draws` healed versions of patches, normalised intensities."""
        keys = content_keys(patches, self.seed)

        def add(moments: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            """Update mean and sum of squared deviations by a draw (Welford 1962, Technometrics)."""
            mean, squares = moments
            healed = self.heal(params, patches, jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))
            difference = healed - mean
            mean = mean + difference / (number + 1)
            return (mean, squares + difference * (healed - mean)), None

        zeros = jnp.zeros_like(patches)
        (mean, squares), _ = jax.lax.scan(add, (zeros, zeros), jnp.arange(self.draws))
        return mean, jnp.sqrt(squares / self.draws)

    def sample(self, params: Params, key: Key[Array, ""], count: int) -> Float[Array, "N P P C"]:
        """Draw patches from noise; see `methods.base.Generative`."""
        keys = jax.random.split(key, (2, count))
        side = self.network.patch_size
        start = self.draw_noise(keys[0], (side, side, self.network.channels))
        clean = self._descend(params, start, keys[1], self.last_step, self.sample_calls)
        return restored(clean, params["moments"])

    @property
    def sampling_calls(self) -> int:
        """Network calls per drawn patch."""
        return self.sample_calls

    @property
    def network_calls(self) -> int:
        """Network calls per tile."""
        return self.calls * self.draws

    # --- scores

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Average the healed versions of patches, normalised intensities."""
        return self.healed_moments(params, patches)[0]

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the residual of the selected score; with several draws, their spread as a further map."""
        mean, spread = self.healed_moments(params, patches)
        maps = RESIDUALS[self.score](patches, mean)
        return maps if self.draws == 1 else jnp.concatenate([maps, spread.mean(-1, keepdims=True)], -1)

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel, px."""
        return smoothing_radius(self.smooth_px)

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Compute the selected score; see `methods.base.Method.score_map`."""
        maps = residual if self.draws == 1 else residual[..., :-1]
        return smoothed_score(maps, foreground, self.score, self.smooth_px, extent)

    @property
    def detail_names(self) -> tuple[str, ...]:
        """Name of the map of the spread of the draws, if there are several."""
        return () if self.draws == 1 else ("spread",)

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Return the standard deviation over draws, mean over channels, normalised intensity."""
        return residual[..., -1:] if self.draws > 1 else residual[..., :0]


def tracked(moments: dict[str, Array], seen: Mapping[str, Array]) -> dict[str, Array]:
    """Add a batch to the averages of mean and mean square, up to `MOMENT_STEPS` batches."""
    steps = moments["steps"]
    weight = jnp.where(steps < MOMENT_STEPS, 1 / (steps + 1), 0)
    averages = {name: moments[name] + weight * (seen[name] - moments[name]) for name in ("mean", "square")}
    return {"steps": jnp.minimum(steps + 1, MOMENT_STEPS), **averages}


def standard_deviation(moments: Mapping[str, Array]) -> Float[Array, ""]:
    """Standard deviation of the training patches, normalised intensity."""
    return jnp.sqrt(jnp.maximum(moments["square"] - moments["mean"] ** 2, LEAST_SD**2))


def standardised(patches: Float[Array, "B P P C"], moments: Mapping[str, Array]) -> Float[Array, "B P P C"]:
    """Standardise normalised intensities to zero mean and unit variance over the training patches."""
    return (patches - moments["mean"]) / standard_deviation(moments)


def restored(patches: Float[Array, "B P P C"], moments: Mapping[str, Array]) -> Float[Array, "B P P C"]:
    """Inverse of `standardised`."""
    return patches * standard_deviation(moments) + moments["mean"]
