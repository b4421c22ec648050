"""What runs a program: torch's own kernels, ONNX Runtime and OpenVINO, each on a file of its own."""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qat_lightning.backend import exact_products
from qat_lightning.decoding import shown
from qat_lightning.errors import ConfigurationError
from qat_lightning.evaluation.latency import interleaved_medians
from qat_lightning.openvino_run import open_openvino
from qat_lightning.program.execution import Run
from qat_lightning.recipe import check_choice

RuntimeName = Literal["torch", "onnxruntime", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
EXTRAS = {"onnxruntime": "onnxruntime", "openvino": "openvino"}

CLOSE = 1.1
"""A runtime that takes no more than this share of the fastest one's time may be the fastest."""


def installed_runtimes() -> tuple[RuntimeName, ...]:
    """Return the runtimes that can be imported here."""
    return tuple(name for name in RUNTIMES if name == "torch" or importlib.util.find_spec(name) is not None)


def saturates(runtime: RuntimeName, bits: int) -> bool:
    """Whether the int8 kernels of a runtime overflow on this processor, so that it computes something else than the model.

    ONNX Runtime can be told to take a way around, OpenVINO cannot:
    https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html

    Args:
        runtime: name of the runtime.
        bits: value range of the weights; two products of 8-bit activations and 7-bit weights fit into 16 bits.
    """
    return runtime == "openvino" and not exact_products(bits)


def require_runtime(name: str) -> RuntimeName:
    """Return a runtime by its name.

    Raises:
        ValueError: no runtime has that name.
        ConfigurationError: it is not installed; names the extra.
    """
    check_choice("runtime", name, RUNTIMES)
    if name not in installed_runtimes():
        raise ConfigurationError(f'runtime={name!r} is not installed: pip install "qat-lightning[{EXTRAS[name]}]", or use runtime="auto".')
    return name


def open_onnx(runtime: RuntimeName, content: bytes, threads: int | None = None, bits: int = 8) -> Run:
    """Return a function that runs an ONNX model.

    Args:
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        content: of the file.
        threads: at most; None: as many as torch uses.
        bits: value range of the weights.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return _open_onnxruntime(content, threads, bits) if runtime == "onnxruntime" else open_openvino(content, threads)


def _open_onnxruntime(content: bytes, threads: int, bits: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not exact_products(bits):
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = {name: tensor.contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(_tensor(array) for array in session.run(None, given))

    return run


def _tensor(array: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@dataclass(frozen=True)
class Timing:
    """How long each runtime took for one call on one machine.

    Args:
        machine: the processor, and the runtimes that were there.
        threads: how many were used.
        shapes: of the inputs.
        milliseconds: by runtime, the medians of interleaved calls.
    """

    machine: str
    threads: int
    shapes: tuple[tuple[int, ...], ...]
    milliseconds: Mapping[RuntimeName, float]

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        if not self.milliseconds or not {*self.milliseconds} <= {*RUNTIMES}:
            raise ValueError(f"milliseconds are of {shown(sorted(self.milliseconds))}, and must be of some of {RUNTIMES}")

    @property
    def fastest(self) -> RuntimeName:
        """Name of the runtime that took least."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])


def measure(runs: Mapping[RuntimeName, Run], tensors: Sequence[Tensor]) -> dict[RuntimeName, float]:
    """Return the milliseconds that each runtime takes, with the threads that it was opened with; those that are close are timed twice."""
    found = _medians(runs, tensors, budget_s=2.0)
    close = {name: runs[name] for name, time in found.items() if time <= CLOSE * min(found.values())}
    return found if len(close) == 1 else {**found, **_medians(close, tensors, budget_s=6.0)}


def _medians(runs: Mapping[RuntimeName, Run], tensors: Sequence[Tensor], budget_s: float) -> dict[RuntimeName, float]:
    candidates = [lambda run=run: run(tensors) for run in runs.values()]
    medians = interleaved_medians(candidates, repeats=100, budget_s=budget_s, threads=torch.get_num_threads())
    return dict(zip(runs, medians, strict=True))
