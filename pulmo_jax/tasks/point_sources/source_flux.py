"""Debiased flux of the sources of a combination of epochs, and its section of the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pulmo_jax.inference.epoch_flux import Flux, JointFlux, joint_flux
from pulmo_jax.reporting.report import Section
from pulmo_jax.reporting.tables import Table
from pulmo_jax.tasks.point_sources.cells import measured

INCONSTANT = 1e-2  # probability below which the report states that the flux varies


@dataclass(frozen=True)
class SourceFlux:
    """Debiased flux of a source.

    Attributes:
        each: Flux in each epoch; NaN where the stack could not be read again.
        joint: Constant flux of all epochs.
    """

    each: tuple[Flux, ...]
    joint: JointFlux


def unknown_flux(n_epochs: int) -> SourceFlux:
    """Flux of a source for which no stack was read."""
    return SourceFlux((Flux(),) * n_epochs, joint_flux([]))


def flux_text(flux: Flux) -> str:
    """Flux with its empirical error or, without one, with that of the likelihood, which is then named."""
    if not np.isfinite(flux.value):
        return "unknown"
    if np.isfinite(flux.std_empirical):
        return measured(flux.value, flux.std_empirical)
    return f"{measured(flux.value, flux.std)} (likelihood)"


def flux_section(fluxes: Sequence[SourceFlux], labels: Sequence[str], biased: Float[np.ndarray, "N E"]) -> Section:
    """Section of the report with the flux of every source in every epoch.

    Args:
        fluxes: Flux of each source.
        labels: Name of each epoch.
        biased: Self-subtracted flux b / a of each source in each epoch.

    Returns:
        The section.
    """
    columns = ["", "epoch", "flux", "self-subtracted"]
    rows = [
        [str(source + 1), label, flux_text(one), f"{value:.3g}"]
        for source, flux in enumerate(fluxes)
        for label, one, value in zip(labels, flux.each, biased[source], strict=True)
    ]
    notes = [joint_note(number + 1, flux.joint) for number, flux in enumerate(fluxes)]
    text = (
        "Debiased flux (Algorithm 3) in the stack of each epoch, at the position of the track. Its error is the "
        "scatter at blank positions of the same separation. The flux of the table of sources is the mean of the "
        "epochs, weighted by these errors. The self-subtracted flux b / a of the maps is lower, because a source "
        "contributes to its own noise statistics."
    )
    return Section("Fluxes", text, [], [Table("Flux by epoch", columns, rows, notes)])


def joint_note(label: int, joint: JointFlux) -> str:
    """Sentence on the flux of all epochs, and whether it is constant."""
    if not joint.epochs:
        return f"Source {label}: no epoch has a debiased flux with an empirical error."
    text = f"Source {label}: {flux_text(joint.flux)} from {joint.epochs} epoch{'s' * (joint.epochs != 1)}"
    if joint.epochs == 1:
        return f"{text}."
    varies = "; the flux varies, or an error is too small" if joint.probability < INCONSTANT else ""
    return (
        f"{text}; chi-squared of a constant flux {joint.chi2:.1f} for {joint.epochs - 1} degrees of freedom, "
        f"probability {joint.probability:.2g}{varies}."
    )
