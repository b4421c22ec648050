"""What the user's code sees of a module that has become a graph."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.plan import Plan


class Surface:
    """What the user's code sees of a module besides its graph: plain attributes, and arguments that the trace has fixed.

    As a forward pre-hook it drops those arguments, after checking that they still have their default value.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        own, kind = vars(nn.Module()), type(module)
        self.attributes: dict[str, Any] = {name: partial(_refuse_method, plan.flow, kind.__name__, name) for name in _methods(kind)}
        self.attributes |= {name: value for name, value in vars(module).items() if name not in own and not name.startswith("_")}
        self.signature = inspect.signature(module.forward)
        self.constants = plan.constants

    @staticmethod
    def found_on(module: nn.Module) -> "Surface":
        """Return the surface that was attached to a module or to what it is a copy of."""
        surface = vars(module)["_surface"]
        assert isinstance(surface, Surface)
        return surface

    def attach(self, module: fx.GraphModule) -> None:
        """Give a graph the attributes, and the hook where it needs one."""
        for name, value in self.attributes.items():
            if not (isinstance(value, partial) and hasattr(type(module), name)):
                setattr(module, name, value)
        vars(module)["_surface"] = self
        self.register(module)
        # A copy of a GraphModule starts without its attributes and forward hooks.
        module._register_deepcopy_hook(self.reattach)

    def register(self, module: fx.GraphModule) -> None:
        """Register the forward hooks."""
        if self.constants:
            module.register_forward_pre_hook(self, with_kwargs=True)

    def reattach(self, module: fx.GraphModule) -> None:
        """Give a copy of a graph what it has lost."""
        module._deepcopy_hooks = []
        self.attach(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the graph, as a forward pre-hook."""
        return self.positional(args, kwargs), {}

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of the graph.

        Raises:
            UnsupportedModelError: an argument that the trace has fixed has another value.
        """
        return tuple(value for name, value in self.bind(args, kwargs).arguments.items() if name not in self.constants)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """Return the arguments of the user's forward, after a check of the fixed ones; see :meth:`positional`."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name in self.constants:
            default, value = self.signature.parameters[name].default, bound.arguments[name]
            if isinstance(value, Tensor) or value != default:
                raise UnsupportedModelError(
                    f"forward was traced with {name}={default!r}, its default, but is called with {name} of type {type(value).__name__}. "
                    f"Set `example_input_array` on the LightningModule (or pass `example` to prepare) to a call "
                    f"that gives {name!r}, so that the trace sees it; or use flow='eager'."
                )
        return bound


def _methods(kind: type) -> Iterator[str]:
    """Yield the public methods that a user's class adds to torch's."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "torch":
            yield from (name for name, value in vars(base).items() if inspect.isfunction(value) and not hasattr(nn.Module, name))


def _refuse_method(flow: str, owner: str, name: str, *args: Any, **kwargs: Any) -> None:
    """Take the place of a method besides forward, which no trace has seen."""
    raise UnsupportedModelError(
        f"flow={flow!r} makes one graph of {owner}.forward, so its method {name!r} is gone. Call the module itself, or name with `modules` "
        f"the parts that {name!r} calls."
    )
