"""Which layers of a prepared module int8 hurts most: each alone in int8, and each alone in float."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from qat_lightning.compilation import inside
from qat_lightning.core import as_call, require_prepared
from qat_lightning.errors import CalibrationError
from qat_lightning.evaluation.divergence import Energy, Outputs, divergence, outputs_of
from qat_lightning.evaluation.plots import plot_sensitivity
from qat_lightning.evaluation.switches import Switches, untouched
from qat_lightning.files import write_atomically
from qat_lightning.observers import check_ranges

Run: TypeAlias = Callable[[Any], Any]

COLUMNS = ("layer", "SQNR (dB)", "divergence, only it in int8", "divergence, all but it in int8")
METRIC_COLUMNS = ("{}, only it in int8", "{}, all but it in int8")


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What int8 does at one layer; see :mod:`qat_lightning.evaluation.switches` for *only* and *all but*.

    Args:
        layer: qualified name, as ``overrides`` takes it.
        sqnr_db: energy of the layer's output over that of the error which rounding its input and its weight makes, in decibel; infinite
            without error.
        only: divergence of the model's outputs from the float model's with only this layer in int8.
        all_but: the same with every other layer in int8.
        metric_only: the metric with only this layer in int8; None where there is no metric.
        metric_all_but: the metric with every other layer in int8.
    """

    layer: str
    sqnr_db: float
    only: float
    all_but: float
    metric_only: float | None = None
    metric_all_but: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Sensitivity of each layer, in order of the module's layers.

    Args:
        rows: one per layer.
        divergence: of the outputs from the float model's with everything in int8; see :mod:`qat_lightning.evaluation.divergence`.
        metric: name of the metric; None where only outputs were compared.
        metric_float: the metric in float.
        metric_int8: the metric with everything in int8.
    """

    rows: tuple[LayerSensitivity, ...]
    divergence: float
    metric: str | None = None
    metric_float: float | None = None
    metric_int8: float | None = None

    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """Return the rows, the layer that alone does most harm first."""
        return tuple(sorted(self.rows, key=lambda row: row.only, reverse=True))

    def columns(self) -> tuple[str, ...]:
        """Return the headings of :meth:`table`."""
        return COLUMNS + (() if self.metric is None else tuple(column.format(self.metric) for column in METRIC_COLUMNS))

    def table(self) -> list[list[str | float | None]]:
        """Return the ranked rows in the order of :meth:`columns`; None stands for infinity."""
        rows = [[row.layer, *map(_finite, (row.sqnr_db, row.only, row.all_but))] for row in self.ranked()]
        if self.metric is not None:
            rows = [[*cells, row.metric_only, row.metric_all_but] for cells, row in zip(rows, self.ranked(), strict=True)]
        return rows

    def to_markdown(self) -> str:
        """Return the table as Markdown, the most sensitive layer first."""
        lines = [
            "# Sensitivity to int8",
            "",
            f"| {' | '.join(self.columns())} |",
            "|" + "---|" * len(self.columns()),
            *(f"| {' | '.join(cells)} |" for cells in self._text()),
            "",
            f"- divergence with everything in int8: {self.divergence:.3g}",
        ]
        if self.metric_float is not None:
            lines.append(f"- {self.metric}: {self.metric_float:.4f} in float, {self.metric_int8:.4f} with everything in int8")
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        """Return the table for ``rich.print``."""
        table = Table(*self.columns(), title="Sensitivity to int8")
        for cells in self._text():
            table.add_row(*cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; null stands for infinity."""
        values = asdict(self)
        rows = [{key: _finite(value) if isinstance(value, float) else value for key, value in row.items()} for row in values.pop("rows")]
        return {**values, "divergence": _finite(self.divergence), "layers": rows}

    def save(self, folder: str | Path, plot: bool = True) -> None:
        """Write ``sensitivity.json`` and ``sensitivity.md`` into ``folder``, and ``sensitivity.png``.

        Raises:
            ConfigurationError: a plot without matplotlib; the other files are written.
        """
        folder = Path(folder)
        write_atomically(folder / "sensitivity.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomically(folder / "sensitivity.md", self.to_markdown())
        if plot:
            self.plot(folder / "sensitivity.png")

    def plot(self, path: str | Path) -> None:
        """Draw divergence and SQNR of each layer, the most sensitive first, as PNG.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        ranked = self.ranked()
        plot_sensitivity(Path(path), [row.layer for row in ranked], [row.only for row in ranked], [row.sqnr_db for row in ranked])

    def _text(self) -> list[list[str]]:
        forms = ("{}", "{:.1f}", "{:.3g}", "{:.3g}", "{:.4f}", "{:.4f}")
        rows = [[row[0] or "(the module)", *row[1:]] for row in self.table()]
        return [["inf" if cell is None else form.format(cell) for form, cell in zip(forms, row, strict=False)] for row in rows]


def measure_sensitivity(
    prepared: nn.Module,
    batches: Iterable[Any],
    metric: Callable[[nn.Module], float] | None = None,
    metric_name: str = "metric",
    progress: bool = False,
) -> Sensitivity:
    """Measure what int8 does at each layer of ``prepared``; the module is left exactly as it was.

    Simulated with fake-quant, so the cost is two runs of ``batches`` per layer, and two evaluations of the metric where there is one.

    Args:
        prepared: from :func:`qat_lightning.prepare`, trained or calibrated; of either flow.
        batches: inputs as in :func:`qat_lightning.calibrate`; all are run, and the outputs of the float model are kept.
        metric: evaluates the module it is given, higher is better: accuracy on labelled data. None compares outputs alone.
        metric_name: its name in the table.
        progress: show a progress bar.

    Raises:
        ConfigurationError: the module was not prepared, or returns no floating-point tensor.
        CalibrationError: it was neither trained nor calibrated, there is no batch, or outputs are not finite.
    """
    bare = inside(prepared)
    require_prepared(bare)
    score = None if metric is None else lambda: metric(prepared)
    return measure({"": bare}, list(batches), lambda batch: as_call(batch).run(bare), score, metric_name, progress)


def measure(
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    run: Run,
    score: Callable[[], float] | None = None,
    metric: str = "metric",
    progress: bool = False,
) -> Sensitivity:
    """Measure the sensitivity of the layers of several modules that run together; see :func:`measure_sensitivity`.

    Args:
        targets: prepared modules by name.
        batches: whatever ``run`` takes.
        run: runs one batch through all of them.
        score: evaluates them as they are at the moment, higher is better.
        metric: name of the score.
        progress: show a progress bar.
    """
    with _switched(targets, batches, run) as (switches, reference, sqnr):

        def measured() -> tuple[float, float | None]:
            return divergence(reference, outputs_of(targets, batches, run)), None if score is None else float(score())

        in_float = None if score is None else float(score())
        switches.all()
        all_int8, metric_int8 = measured()
        rows = []
        for name in _track(switches.layers, progress):
            switches.only(name)
            only, metric_only = measured()
            switches.all_but(name)
            all_but, metric_all_but = measured()
            rows.append(
                LayerSensitivity(
                    layer=name,
                    sqnr_db=sqnr[name].sqnr_db,
                    only=only,
                    all_but=all_but,
                    metric_only=metric_only,
                    metric_all_but=metric_all_but,
                )
            )
    return Sensitivity(
        rows=tuple(rows),
        divergence=all_int8,
        metric=None if score is None else metric,
        metric_float=in_float,
        metric_int8=metric_int8,
    )


def rank_layers(targets: Mapping[str, nn.Module], batches: Sequence[Any], run: Run, progress: bool = False) -> tuple[str, ...]:
    """Return the names of the layers, the one that alone changes the outputs most first; one run of ``batches`` per layer.

    Args:
        targets: prepared modules by name.
        batches: whatever ``run`` takes.
        run: runs one batch through all of them.
        progress: show a progress bar.
    """
    harm = {}
    with _switched(targets, batches, run) as (switches, reference, _):
        for name in _track(switches.layers, progress):
            switches.only(name)
            harm[name] = divergence(reference, outputs_of(targets, batches, run))
    return tuple(sorted(harm, key=lambda name: harm[name], reverse=True))


@contextmanager
def _switched(targets: Mapping[str, nn.Module], batches: Sequence[Any], run: Run) -> Iterator[tuple[Switches, Outputs, dict[str, Energy]]]:
    """Give switches, all off, with the outputs of the float model and the SQNR of each layer; put everything back at the end."""
    if not batches:
        raise CalibrationError("There is no batch to measure sensitivity with: give at least one.")
    for name, target in targets.items():
        check_ranges(target, f"module {name!r}" if name else "sensitivity")
    with untouched(targets):
        switches = Switches(targets, lambda: run(batches[0]))
        sqnr = {name: Energy() for name in switches.layers}
        handles = [
            layer.register_forward_hook(_noise(switches.inputs[name], sqnr[name]), prepend=True, with_kwargs=True)
            for name, copies in switches.layers.items()
            for layer in copies
        ]
        try:
            reference = outputs_of(targets, batches, run)
        finally:
            for handle in handles:
                handle.remove()
        yield switches, reference, sqnr


def _noise(grids: Sequence[Any], energy: Energy) -> Callable[..., None]:
    """Return a hook that runs a layer, which has computed in float, once more with its weight and its input rounded."""

    def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        value = args[0] if args else kwargs["input"]
        switched = [layer.weight_fake_quant, *(grids if len(grids) == 1 else ())]
        for quant in switched:
            quant.enable_fake_quant(True)
        # Not by a call, which would run the hooks.
        energy.add(output, layer.forward(switched[1].forward(value) if switched[1:] else value))
        for quant in switched:
            quant.enable_fake_quant(False)

    return hook


def _track(names: Iterable[str], progress: bool) -> Iterable[str]:
    listed = list(names)
    return track(listed, "Measuring sensitivity") if progress else listed


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
