"""Ensemble of networks of one method, which differ in their random initialisation and noise.

All networks are trained in one program on the same batches, vectorised by `vmap`. The score is the mean of the scores
of the networks, and their standard deviation is a further map: it is high where the networks disagree
(Lakshminarayanan, Pritzel and Blundell 2017, NeurIPS).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from pulmo_jax.methods.base import Detailed, Iterative, Method, Params, Tuned
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.methods.windows import OfWindows

SPREAD = "spread"


@dataclass(frozen=True)
class Ensemble:
    """N networks of one method; implements methods.base.Method and Detailed.

    All parameters have a leading axis over the networks.

    Attributes:
        members: The method with N networks of different initial parameters.
    """

    members: tuple[Method, ...]

    @property
    def member(self) -> Method:
        """The method; its functions take the parameters of any network."""
        return self.members[0]

    @property
    def count(self) -> int:
        """Number N of networks."""
        return len(self.members)

    @property
    def halo_px(self) -> int:
        return self.member.halo_px

    def init(self) -> Params:
        """Stack the initial parameters of the networks."""
        return stacked([member.init() for member in self.members])

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean loss of the networks."""
        return jax.vmap(self.member.train_loss, in_axes=(0, None, 0))(
            params, batch, jax.random.split(key, self.count)
        ).mean()

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Compute the mean reconstruction of the networks."""
        return self._each(self.member.reconstruct, params, patches).mean(0)

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the residual maps of all networks, one network after another."""
        maps = self._each(self.member.residual, params, patches)
        return jnp.moveaxis(maps, 0, -2).reshape(*maps.shape[1:-1], -1)

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Compute the mean score of the networks; see `methods.base.Method.score_map`."""
        return self._scores(residual, foreground, extent).mean(0)

    @property
    def detail_names(self) -> tuple[str, ...]:
        """The spread of the scores, and the further maps of the method."""
        return (SPREAD, *(name for name in names_of(self.member) if name != SPREAD))

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Compute the standard deviation of the scores, and the mean further maps of the networks."""
        maps = [self._scores(residual, foreground, extent).std(0)]
        member = self.member
        if isinstance(member, Detailed):
            each = jnp.stack([member.detail_maps(one, foreground, extent) for one in self._apart(residual)]).mean(0)
            maps += [each[..., i] for i, name in enumerate(member.detail_names) if name != SPREAD]
        return jnp.stack(maps, axis=-1)

    def _scores(self, residual: Array, foreground: Array, extent: Extent | None) -> Float[Array, "N H W"]:
        """Score map of each network."""
        return jnp.stack([self.member.score_map(one, foreground, extent) for one in self._apart(residual)])

    def _apart(self, residual: Float[Array, "H W M"]) -> list[Float[Array, "H W m"]]:
        """Residual maps of each network."""
        return jnp.split(residual, self.count, axis=-1)

    def _each(self, function: Any, params: Params, patches: Array) -> Array:
        """Evaluate a function of the method with each network."""
        return jax.vmap(function, in_axes=(0, None))(params, patches)


def networks(method: Method, params: Params) -> list[tuple[Method, Params]]:
    """Method and parameters of each network of an ensemble, or of the only one.

    Args:
        method: Method, which may be an ensemble.
        params: Its parameters.

    Returns:
        One pair per network.
    """
    if not isinstance(method, Ensemble):
        return [(method, params)]
    return [(method.member, jax.tree.map(lambda p, i=i: p[i], params)) for i in range(method.count)]


def calls_per_tile(method: Method) -> int | None:
    """Number of network evaluations per tile, if a method needs several for each network.

    Args:
        method: Method, which may be an ensemble or whiten the residual of a base.

    Returns:
        Evaluations of all networks; None if each network is evaluated once.
    """
    if isinstance(method, Ensemble):
        one = calls_per_tile(method.member)
        return None if one is None else method.count * one
    if isinstance(method, OfWindows) and method.base is not None:
        return calls_per_tile(method.base)
    return method.network_calls if isinstance(method, Iterative) else None


def tuned(method: Method, params: Params, patches: Float[Array, "N P P C"]) -> dict[str, Array]:
    """Compute the numbers of a `Tuned` method on normal validation patches, for each network of an ensemble.

    Args:
        method: Method, which may be an ensemble.
        params: Trained parameters.
        patches: Normal validation patches, normalised intensities.

    Returns:
        The entry "tuned" of the parameters; empty for another method.
    """
    found = [one.tune(own, patches) if isinstance(one, Tuned) else {} for one, own in networks(method, params)]
    return stacked(found) if isinstance(method, Ensemble) else found[0]


def stacked(parts: Sequence[Params]) -> Params:
    """Stack the parameters of several networks along a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def names_of(method: Method) -> tuple[str, ...]:
    """Names of the further maps of a method; empty if there are none."""
    return method.detail_names if isinstance(method, Detailed) else ()
