"""What a flow is, and how one is found by name."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.layerwise import Visit
from qat_lightning.plan import STATIC_LAYERS, Call, Plan
from qat_lightning.recipe import FLOWS, check_choice
from qat_lightning.report import LayerParity, LayerReport


class Flow(Protocol):
    """A way to swap the layers of a module for fake-quantized and for int8 ones.

    A prepared module has fake-quant and observers, all switched off; an int8 module runs on the CPU only.
    """

    def prepare(self, module: nn.Module, plan: Plan) -> nn.Module:
        """Return ``module`` with fake-quant inserted, sharing its parameters; ``module`` itself is used up.

        Raises:
            UnsupportedModelError: names the submodule and line that the flow cannot handle, and a flow that can.
        """
        ...

    def convert(self, prepared: nn.Module, plan: Plan) -> nn.Module:
        """Return the int8 module; ``prepared`` is used up and lies on the CPU."""
        ...

    def quantize_dynamic(self, module: nn.Module, plan: Plan) -> nn.Module:
        """Return ``module`` with its planned layers quantized dynamically; ``module`` itself is used up."""
        ...

    def parity(self, prepared: nn.Module, int8: nn.Module, calls: Sequence[Call]) -> list[LayerParity]:
        """Compare the two layer by layer, each int8 layer fed with what its fake-quantized twin was fed with."""
        ...

    def walk(self, prepared: nn.Module, calls: Sequence[Call], visit: Visit, progress: bool) -> None:
        """Visit the layers of a calibrated module in the order in which they run, each with its inputs in int8 and in float."""
        ...

    def pack(self, int8: nn.Module, plan: Plan) -> None:
        """Pack the weights of each layer with the engine that its plan names; loading and copying forget it."""
        ...

    def portable_state(self, model: nn.Module) -> dict[str, Any]:
        """Return the state dict of a model with int8 modules, with nothing in it but tensors, pairs of tensors, dtypes and None."""
        ...

    def load_portable_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Load what ``portable_state`` returned; KeyError or RuntimeError where it does not fit."""
        ...

    def layers(self, int8: nn.Module, plan: Plan) -> Iterator[LayerReport]:
        """Yield the layers that run in int8."""
        ...


def get_flow(name: str) -> Flow:
    """Return the flow of that name; its module is imported only now.

    Raises:
        ValueError: no flow has that name.
        ConfigurationError: this torch no longer has what the flow is made of.
    """
    check_choice("flow", name, FLOWS)
    try:
        return cast(Flow, importlib.import_module(f"qat_lightning.flows.{name}"))
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torch.ao"):
            raise
        raise ConfigurationError(
            f"flow={name!r} needs torch.ao.quantization, which torch {torch.__version__} does not have ({error}). Use flow='pt2e', or an "
            f"older torch."
        ) from error


class Parent(nn.Module):
    """Gives a module that cannot hold stubs, or is itself the layer to swap, a parent that can."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.training = wrapped.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.wrapped(*args, **kwargs)


class UnaryParent(Parent):
    """A parent with one argument, so that it can be traced."""

    def forward(self, input: Any) -> Any:
        """Call the module."""
        return self.wrapped(input)


def with_parent(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """Return ``module`` in a :class:`Parent`, and its plan with the names as they are then."""

    def rename(name: str) -> str:
        return f"wrapped.{name}".rstrip(".")

    parent = (UnaryParent if isinstance(module, (*STATIC_LAYERS, nn.Sequential)) else Parent)(module)
    return parent, replace(
        plan,
        layers={rename(name): layer for name, layer in plan.layers.items()},
        float_modules=tuple(rename(name) for name in plan.float_modules),
        fuse=None if plan.fuse is None else tuple(tuple(rename(name) for name in group) for group in plan.fuse),
        constants=(),
    )
