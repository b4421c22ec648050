"""What became of a model: float, fake-quant and int8 side by side, as Markdown, JSON and flat numbers for a logger."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qat_lightning.errors import shorten
from qat_lightning.files import write_atomically

Column: TypeAlias = Literal["float32", "fake_quant", "int8"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One column of the report; None where a figure was not measured.

    Args:
        accuracy: fraction of the test set.
        size_bytes: serialized weights.
        latency_ms: median of single-thread runs of batch 1.
    """

    accuracy: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """Fake-quant against int8 at one layer that was given the same quantized input.

    Args:
        layer: qualified name.
        max_steps: largest difference of an output, in quantization steps of that output.
        differing: fraction of the outputs that differ at all.
    """

    layer: str
    max_steps: int
    differing: float


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How one layer runs in int8.

    Args:
        layer: qualified name.
        engine: the engine whose kernel runs it.
        activation_bits: value range of its input.
        weight_bits: value range of its weights.
        per_channel: one weight scale per output channel.
        scale: quantization step of its output; None where it has none (dynamic).
        zero_point: zero point of its output.
    """

    layer: str
    engine: str
    activation_bits: int
    weight_bits: int = 8
    per_channel: bool
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """Which layers stay in float so that int8 is accurate enough, and what that costs.

    Args:
        metric: what was measured on the validation data, higher is better: a metric of the model, or the agreement of outputs, which is
            one minus their divergence (see :mod:`qat_lightning.evaluation.divergence`).
        max_drop: what int8 may lose of it.
        met: whether it loses no more; else ``kept`` is the best that was found.
        float32: the metric in float.
        all_int8: with every layer in int8.
        int8: with ``kept`` in float.
        kept: qualified names of the layers.
        layers: how many layers there are to quantize.
        trials: how many int8 models were made and measured.
        added_bytes: size, compared with every layer in int8.
        added_ms: latency, compared with every layer in int8; None where nothing was timed.
    """

    metric: str
    max_drop: float
    met: bool
    float32: float
    all_int8: float
    int8: float
    kept: tuple[str, ...]
    layers: int
    trials: int
    added_bytes: int = 0
    added_ms: float | None = None

    def sentence(self) -> str:
        """Return all of it in one line."""
        figures = f"{self.metric} {self.float32:.4f} in float, {self.all_int8:.4f} with all {self.layers} layers in int8"
        bound = f"max_accuracy_drop={self.max_drop:g}"
        if not self.kept:
            return f"none, {figures}: {bound} is {'met' if self.met else 'NOT MET, and no layer in float brings it closer'}"
        time = "" if self.added_ms is None else f" and {self.added_ms:+.3f} ms"
        cost = f"{_show(self.added_bytes, '{:+.3f}', 1e-6)} MB{time}"
        verdict = "is met" if self.met else "is NOT MET, this is the best that was found"
        return f"{shorten(list(self.kept))}; {figures}, {self.int8:.4f} with these in float, which costs {cost}: {bound} {verdict}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a quantization.

    Args:
        recipe: ``"qat"``, ``"ptq"`` or ``"dynamic"``.
        flow: the flow that carried the recipe out.
        backend: the engine the int8 model was made for.
        quantized_modules: layers with weights that run in int8.
        float32: the model before quantization.
        fake_quant: the trained model with simulated rounding; QAT only.
        int8: the converted model.
        parity: fake-quant against int8, layer by layer; None for dynamic quantization, which has no fake-quant.
        layers: kernel, value range and output qparams of every quantized layer.
        model: name of the model.
        data: name of the data.
        torch: version of PyTorch.
        cpu: the processor the figures were taken on.
        checkpoint: name of the checkpoint whose weights were converted; None: the final weights.
        fallback: the layers that stay in float for the sake of accuracy; None where no bound was given.
    """

    recipe: str
    flow: str
    backend: str
    quantized_modules: int
    float32: Measurement = field(default_factory=Measurement)
    fake_quant: Measurement | None = None
    int8: Measurement = field(default_factory=Measurement)
    parity: tuple[LayerParity, ...] | None = None
    layers: tuple[LayerReport, ...] = ()
    model: str = ""
    data: str = ""
    torch: str = ""
    cpu: str = ""
    checkpoint: str | None = None
    fallback: Fallback | None = None

    @property
    def max_steps(self) -> int | None:
        """Largest difference of fake-quant and int8 at any layer, in quantization steps; None where nothing was compared."""
        return max((layer.max_steps for layer in self.parity), default=None) if self.parity else None

    @property
    def parity_passed(self) -> bool | None:
        """Whether no layer is further than one quantization step from its fake-quant twin; None where nothing was compared."""
        return None if self.max_steps is None else self.max_steps <= 1

    @property
    def speedup(self) -> float | None:
        """Float latency over int8 latency; None where one is missing."""
        if self.float32.latency_ms is None or self.int8.latency_ms is None:
            return None
        return self.float32.latency_ms / self.int8.latency_ms

    def named(self, model: str, data: str) -> Report:
        """Return a copy that says which model on which data."""
        return replace(self, model=model, data=data)

    def with_accuracy(self, column: Column, accuracy: float) -> Report:
        """Return a copy whose column has this accuracy, a fraction of the test set."""
        measurement = getattr(self, column) or Measurement()
        changed: dict[str, Any] = {column: replace(measurement, accuracy=accuracy)}
        return replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds."""
        report: dict[str, Any] = {
            "recipe": self.recipe,
            "flow": self.flow,
            "backend": self.backend,
            "model": self.model,
            "data": self.data,
            "torch": self.torch,
            "cpu": self.cpu,
            "checkpoint": self.checkpoint,
            "quantized_modules": self.quantized_modules,
            "float": asdict(self.float32),
            "int8": asdict(self.int8),
            "speedup": self.speedup,
            "parity": {
                "max_steps": self.max_steps,
                "passed": self.parity_passed,
                "layers": [asdict(layer) for layer in self.parity or ()],
            },
            "layers": [asdict(layer) for layer in self.layers],
        }
        if self.fake_quant is not None:
            report["fake_quant"] = {"accuracy": self.fake_quant.accuracy}
        if self.fallback is not None:
            report["fallback"] = asdict(self.fallback)
        return report

    def scalars(self) -> dict[str, float]:
        """Return the figures a logger's summary takes, e.g. ``int8/acc`` and ``int8/size_mb``; unmeasured ones are left out."""
        columns = {"float": self.float32, "fake_quant": self.fake_quant or Measurement(), "int8": self.int8}
        figures: dict[str, float | None] = {"int8/quantized_modules": self.quantized_modules, "int8/speedup": self.speedup}
        for name, column in columns.items():
            figures[f"{name}/acc"] = column.accuracy
            figures[f"{name}/size_mb"] = None if column.size_bytes is None else column.size_bytes / 1e6
            figures[f"{name}/latency_ms"] = column.latency_ms
        figures["parity/max_steps"] = self.max_steps
        return {name: float(figure) for name, figure in figures.items() if figure is not None}

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: a figure's name, then float, fake-quant and int8 as text."""
        columns = (self.float32, self.fake_quant or Measurement(), self.int8)
        return [
            ("accuracy", *(_show(column.accuracy, "{:.4f}") for column in columns)),
            ("size (MB)", *(_show(column.size_bytes, "{:.3f}", 1e-6) for column in columns)),
            ("latency (ms)", *(_show(column.latency_ms, "{:.3f}") for column in columns)),
        ]

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        subject = " on ".join(part for part in (self.model, self.data) if part)
        lines = [
            f"# int8 by {self.recipe} ({self.flow}, {self.backend})" + (f": {subject}" if subject else ""),
            "",
            "| | float | fake-quant | int8 |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in self.rows()),
            "",
            f"- quantized modules: {self.quantized_modules}",
            *([] if self.fallback is None else [f"- kept in float: {self.fallback.sentence()}"]),
            f"- converted weights: {'the final ones' if self.checkpoint is None else self.checkpoint}",
            f"- speed-up: {_show(self.speedup, '{:.2f}')} x (batch 1, one thread, median)",
            f"- parity of fake-quant and int8: {self._parity_sentence()}",
            f"- kernels: {self._kernel_sentence()}",
            f"- torch {self.torch}, {self.cpu}",
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``, each whole or not at all."""
        write_atomically(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomically(folder / "report.md", self.to_markdown())

    def _parity_sentence(self) -> str:
        if not self.parity:
            return "not compared"
        worst = max(self.parity, key=lambda layer: layer.max_steps)
        verdict = "passed" if self.parity_passed else f"FAILED at {worst.layer}"
        return f"{verdict}, at most {worst.max_steps} quantization step(s) in {len(self.parity)} layers"

    def _kernel_sentence(self) -> str:
        counts: dict[str, int] = {}
        for layer in self.layers:
            kernel = f"{layer.engine} with {layer.activation_bits}-bit inputs"
            kernel += "" if layer.weight_bits == 8 else f" and {layer.weight_bits}-bit weights"
            counts[kernel] = counts.get(kernel, 0) + 1
        return ", ".join(f"{count} x {kernel}" for kernel, count in counts.items()) or "none"


def _show(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)
