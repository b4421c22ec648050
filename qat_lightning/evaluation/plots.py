"""Plots as PNG files; the only module that knows matplotlib, an optional dependency."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from qat_lightning.errors import ConfigurationError


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_sensitivity(path: Path, layers: Sequence[str], divergences: Sequence[float], sqnr_db: Sequence[float]) -> None:
    """Draw two bars per layer, divergence and SQNR.

    Args:
        path: the PNG file; its folder is made if there is none.
        layers: names, from top to bottom.
        divergences: of the outputs with only this layer in int8, on a logarithmic axis.
        sqnr_db: of the layer's output, in decibel.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    if not can_plot():
        raise ConfigurationError('Plots need matplotlib: pip install "qat-lightning[plot]", or pip install matplotlib.')
    # Not pyplot, which would choose a window system for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.22 * len(layers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(layers, divergences, color="tab:red")
    left.set_xlabel("divergence of the outputs, only this layer in int8")
    if any(value > 0 for value in divergences):
        left.set_xscale("log")
    left.invert_yaxis()
    right.barh(layers, [value if math.isfinite(value) else 0.0 for value in sqnr_db], color="tab:blue")
    right.set_xlabel("SQNR of the layer's output (dB)")
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
