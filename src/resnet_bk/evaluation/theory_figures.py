"""Figures of the theory: what the Green functions, bounds and spectra look like, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resnet_bk.evaluation.token_medium import SENTENCE, TokenMedium, medium_of_words
from resnet_bk.theory.bounds import combes_thomas_bound
from resnet_bk.theory.bounds_decay import decay_envelope
from resnet_bk.theory.density import density_of_states
from resnet_bk.theory.jacobi import free_root, half_line_green
from resnet_bk.theory.limiting_absorption import absorption_curve
from resnet_bk.theory.potentials import GUE_RATIO, POISSON_RATIO, spacing_ratio
from resnet_bk.theory.spacings import windowed_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f4e79", "#b5482f", "#4f8f5b", "#8a6d3b", "#6b4c8a")
PALE = "#9bb8d3"


def draw_theory_figures(
    folder: str | Path, *, medium: TokenMedium | None = None, only: str | None = None
) -> list[Path]:
    """Paths of the figures just written, each as PNG and as SVG.

    Args:
        folder: where to write; created if missing.
        medium: the text for the spectral shift; default the words of a sentence of Python's documentation.
        only: name of one figure out of `FIGURES`; default all.

    Returns:
        Paths, two a figure. The figures are the same in every call.

    Cost: about 10 seconds on one core.
    """
    # Agg draws without a display; the pyplot state machine stays untouched.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    names = FIGURES if only is None else {only: FIGURES[only]}
    # Identical files in every run, so that a change of a figure is a change of what it shows.
    with matplotlib.rc_context({"svg.hashsalt": "resnet-bk", "font.size": 10, "axes.titlesize": 10}):
        for name, draw in names.items():
            figure = draw(medium or medium_of_words(SENTENCE)) if draw is spectral_shift_figure else draw()
            FigureCanvasAgg(figure)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, format=suffix, dpi=120, metadata=metadata)
                written.append(path)
    return written


def phase_portrait_figure() -> Figure:
    """The Green function of ten sites over complex energies, and the orbits of the recursion in the unit disc."""
    from matplotlib.colors import hsv_to_rgb

    figure = _figure(10.5, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    sites, eta = 10, 0.15
    potential = 0.8 * _normal(7, sites)
    real, imag = (
        torch.linspace(-3.6, 3.6, 361, dtype=torch.float64),
        torch.linspace(-0.9, 0.9, 181, dtype=torch.float64),
    )
    z = torch.complex(real[None, :].expand(181, -1), imag[:, None].expand(-1, 361))
    m = torch.zeros_like(z)
    for v in potential.tolist():
        m = 1 / (v - 1j * eta - z - m)
    hue = (m.angle() / (2 * math.pi)) % 1
    # Brightness repeats with every factor of two in |m|, which shows poles and zeros as nested rings.
    value = 0.72 + 0.28 * (m.abs().log2() % 1)
    picture = hsv_to_rgb(torch.stack([hue, torch.full_like(hue, 0.65), value], dim=-1).numpy())
    left.imshow(picture, origin="lower", extent=(-3.6, 3.6, -0.9, 0.9), aspect="auto", interpolation="bilinear")
    left.axhline(0, color="white", linewidth=0.8)
    left.axhline(-eta, color="white", linewidth=0.8, linestyle=":")
    left.text(-3.5, 0.04, "real energies", color="white", fontsize=8)
    left.text(-3.5, -eta - 0.1, "poles: levels, lowered by the absorption", color="white", fontsize=8)
    left.set_title("Green function of 10 sites at complex energies:\ncolour is its argument, rings are factors of 2")
    left.set_xlabel("Re E (hopping)")
    left.set_ylabel("Im E (hopping)")
    angle = torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)
    right.plot(angle.cos(), angle.sin(), color="black", linewidth=0.8)
    labels = ("inside the band, detuning 0.7", "near the edge, detuning 1.95", "barrier, detuning 2.6")
    for detuning, colour, label in zip((0.7, 1.95, 2.6), COLOURS, labels, strict=False):
        orbit = half_line_green(
            torch.full((120,), detuning, dtype=torch.float64), torch.full((120,), 0.03, dtype=torch.float64)
        )
        disc = _disc(torch.cat([orbit.new_zeros(1), orbit]))
        right.plot(disc.real, disc.imag, ".", markersize=4, color=colour, label=label)
        fixed = _disc(
            free_root(torch.tensor([detuning], dtype=torch.float64), torch.tensor([0.03], dtype=torch.float64))
        )
        right.plot(fixed.real, fixed.imag, "*", color=colour, markersize=11, markeredgecolor="black")
    right.set_aspect("equal")
    right.axis("off")
    right.set_title("orbits of the recursion in the disc,\nabsorption 0.03; stars: the free line")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    return figure


def density_figure() -> Figure:
    """Density of states of the free line and of two disordered ones."""
    figure = _figure(7.5, 4.4)
    axes = figure.subplots()
    energies, sites = torch.linspace(-5, 5, 401, dtype=torch.float64), 400
    band = torch.linspace(-1.985, 1.985, 400, dtype=torch.float64)
    axes.plot(band, 1 / (math.pi * (4 - band.square()).sqrt()), "--", color="black", linewidth=1, label="free, exact")
    for strength, colour in zip((0.0, 0.8, 2.0), COLOURS, strict=False):
        potential = strength * _normal(11, sites)
        density = density_of_states(potential, energies, torch.full((sites,), 0.05, dtype=torch.float64))
        label = "free" if strength == 0 else f"potential of standard deviation {strength:g}"
        axes.plot(energies, density, color=colour, linewidth=1.4, label=label)
    axes.set_xlabel("energy (hopping)")
    axes.set_ylabel("states per site and energy")
    axes.set_ylim(0, 0.75)
    axes.set_title("density of states of 400 sites, smoothed by an absorption of 0.05")
    return _finished(figure, axes, columns=2)


def decay_figure() -> Figure:
    """Largest |G_ij| by distance over random media, against the line of Combes and Thomas."""
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    sites = 160
    distance = torch.arange(sites)
    for eta, colour in zip((0.03, 0.1, 0.3), COLOURS, strict=False):
        absorption = torch.full((sites,), eta, dtype=torch.float64)
        largest = torch.zeros(sites, dtype=torch.float64)
        for seed in range(20):
            found = combes_thomas_bound((seed % 4) * 0.15 * _normal(seed, sites), absorption)
            values = torch.stack([found.value.diagonal(-int(d)).max() for d in distance])
            largest = torch.maximum(largest, values)
        line = combes_thomas_bound(torch.zeros(sites, dtype=torch.float64), absorption).bound[:, 0]
        axes.semilogy(distance, line, "--", color=colour, linewidth=1.3)
        axes.semilogy(distance, decay_envelope(sites, eta), ":", color=colour, linewidth=1.3)
        axes.semilogy(distance, largest, color=colour, linewidth=1.4, label=f"absorption {eta:g}")
    axes.plot([], [], "--", color="grey", label="Combes-Thomas bound")
    axes.plot([], [], ":", color="grey", label="best weight at each distance")
    axes.set_xlabel("distance i - j (sites)")
    axes.set_ylabel("|G(i, j)|")
    axes.set_ylim(1e-10, 2e2)
    axes.set_title("decay of the causal kernel: largest entry of 20 media of 160 sites, and bounds for all media")
    return _finished(figure, axes, columns=3)


def spectral_shift_figure(medium: TokenMedium) -> Figure:
    """Spectral shift of a text token by token, and the potential of the tokens."""
    shift, count = medium.spectral_shift(), len(medium.tokens)
    figure = _figure(max(7.5, min(20.0, 0.42 * count + 2)), 5.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    position = torch.arange(count)
    heads = torch.linspace(0, len(medium.energy) - 1, min(5, len(medium.energy))).round().long().unique().tolist()
    for head, colour in zip(heads, COLOURS, strict=False):
        label = f"energy {float(medium.energy[head]):.2g}"
        above.plot(position, shift[:, head], "o-", color=colour, markersize=3.5, linewidth=1.3, label=label)
    same = bool((medium.potential == medium.potential[:, :1]).all())
    for offset, (head, colour) in enumerate(zip(heads[:1] if same else heads, COLOURS, strict=False)):
        width = 0.8 / (1 if same else len(heads))
        place = position + (0 if same else (offset + 0.5) * width - 0.4)
        below.bar(place.numpy(), medium.potential[:, head].numpy(), width=width, color=PALE if same else colour)
    for axes in (above, below):
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    above.set_ylabel("spectral shift (levels)")
    below.set_ylabel("potential (hopping)")
    shown = [
        token.replace("\n", "↵").replace(" ", "·") if token.isspace() else token.strip() for token in medium.tokens
    ]
    below.set_xticks(position, shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    above.set_title(f"spectral shift of a text, token by token; {medium.source}")
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def limiting_absorption_figure() -> Figure:
    """Weighted norms of the resolvent as the absorption vanishes: in the band, towards its edge, at a trapped level."""
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    absorptions = torch.logspace(0, -6, 25, dtype=torch.float64)
    free = torch.zeros(101, dtype=torch.float64)
    well = free.clone()
    well[49] = well[51] = 10.0
    cases = [(free, energy, f"free, energy {energy:g}") for energy in (0.5, 1.9, 1.99, 1.9999)]
    cases.append((well, -0.2, "site between barriers of 10, its level"))
    for (potential, energy, label), colour in zip(cases, COLOURS, strict=True):
        curve = absorption_curve(potential, energy, absorptions)
        axes.loglog(absorptions, curve, color=colour, linewidth=1.5, label=label)
    axes.loglog(absorptions, 1 / absorptions, "--", color="black", linewidth=1, label="without weights: 1 / absorption")
    axes.set_xlim(1, 1e-6)
    axes.set_ylim(0.4, 3e3)
    axes.set_xlabel("absorption (hopping)")
    axes.set_ylabel("norm of the resolvent, weights 1 / |X|")
    axes.set_title("limiting absorption: bounded inside the band, lost towards the edge at 2")
    return _finished(figure, axes, columns=3)


def spacing_figure() -> Figure:
    """Histograms of the spacing ratio for the prime-bump potential and its controls, with the reference laws."""
    figure = _figure(10.0, 5.6)
    grid = figure.subplots(2, 2, sharex=True)
    ratio = torch.linspace(0, 1, 200, dtype=torch.float64)
    poisson = 2 / (1 + ratio) ** 2
    unitary = 2 * 81 * math.sqrt(3) / (4 * math.pi) * (ratio + ratio**2) ** 2 / (1 + ratio + ratio**2) ** 4
    for axes, kind in zip(grid.flat, ("prime-bump", "shuffled", "random", "none"), strict=True):
        levels = windowed_levels(kind, sites=512, windows=20, epsilon=0.1, strength=1.0)
        found = spacing_ratio(levels)
        spacing = levels.diff(dim=-1)
        ratios = torch.minimum(spacing[:, 1:], spacing[:, :-1]) / torch.maximum(spacing[:, 1:], spacing[:, :-1])
        axes.hist(ratios.flatten().numpy(), bins=40, range=(0, 1), density=True, color=PALE)
        axes.plot(
            ratio, poisson, color=COLOURS[0], linewidth=1.4, label=f"independent levels, mean {POISSON_RATIO:.3f}"
        )
        axes.plot(ratio, unitary, color=COLOURS[1], linewidth=1.4, label=f"unitary ensemble, mean {GUE_RATIO:.3f}")
        name = "no potential (one level after the other)" if kind == "none" else kind
        axes.set_title(f"{name}: mean {found.mean:.3f} ± {found.standard_error:.3f}")
        axes.set_ylim(0, 2.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in grid[1]:
        axes.set_xlabel("ratio of neighbouring spacings")
    for axes in grid[:, 0]:
        axes.set_ylabel("density")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


FIGURES: dict[str, Callable[..., Figure]] = {
    "phase-portrait": phase_portrait_figure,
    "density-of-states": density_figure,
    "decay": decay_figure,
    "spectral-shift": spectral_shift_figure,
    "limiting-absorption": limiting_absorption_figure,
    "spacings": spacing_figure,
}
"""Name of the file -> what draws it."""


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Figure, axes: Axes, columns: int) -> Figure:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _disc(m: Tensor) -> Tensor:
    """The upper half plane in the unit disc."""
    return (m - 1j) / (m + 1j)


def _normal(seed: int, sites: int) -> Tensor:
    return torch.randn(sites, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
