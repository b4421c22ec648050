"""The pt2e flow: ``torch.export`` and fake-quant of this package. Nothing of it is in ``torch.ao``.

int8 modules store weights as integers and compute between grids of uint8 in float, which plain PyTorch runs anywhere and ``torch.compile``
can fuse.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from qat_lightning.affine import QParams
from qat_lightning.flows.annotating import annotate, planned_layer
from qat_lightning.flows.base import with_parent
from qat_lightning.flows.exporting import export
from qat_lightning.flows.fake_quant import ACTIVATION_MAX, ActivationFakeQuantize
from qat_lightning.flows.quantized_layers import DynamicLinear, Int8Layer, Requantize
from qat_lightning.flows.surface import Surface
from qat_lightning.flows.unused import drop_unused, keep_unused
from qat_lightning.flows.walking import walk_traced as walk
from qat_lightning.observers import measure_weights
from qat_lightning.parity import Reference, compare
from qat_lightning.plan import Call, Plan
from qat_lightning.report import LayerParity, LayerReport

__all__ = ["convert", "layers", "load_portable_state", "pack", "parity", "portable_state", "prepare", "quantize_dynamic", "walk"]


def prepare(module: nn.Module, plan: Plan) -> nn.Module:
    """Export ``module`` and return a graph with fake-quant; see :class:`qat_lightning.flows.base.Flow`."""
    training = module.training
    if "" in plan.layers:
        module, plan = with_parent(module, plan)
    prepared, surface = export(module, plan)
    annotate(prepared, plan)
    measure_weights(prepared)
    if plan.observer is None:
        keep_unused(prepared, module)
    surface.attach(prepared)
    return prepared.train(training)


def convert(prepared: nn.Module, plan: Plan) -> nn.Module:
    """Return the int8 graph; see :class:`qat_lightning.flows.base.Flow`."""
    assert isinstance(prepared, fx.GraphModule)
    prepared.eval()
    drop_unused(prepared)
    for name, child in list(prepared.named_modules()):
        if hasattr(child, "weight_fake_quant"):
            prepared.set_submodule(name, Int8Layer(child))
        elif isinstance(child, ActivationFakeQuantize):
            prepared.set_submodule(name, Requantize(child))
    prepared.requires_grad_(False)
    return prepared


def quantize_dynamic(module: nn.Module, plan: Plan) -> nn.Module:
    """Return ``module`` with dynamic int8 linear layers; nothing is exported. See :class:`qat_lightning.flows.base.Flow`."""
    if "" in plan.layers:
        module, plan = with_parent(module, plan)
    module.eval()
    for name, layer in plan.layers.items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, DynamicLinear(linear, layer.per_channel, layer.kernel.activation_bits))
    return module


def parity(prepared: nn.Module, int8: nn.Module, calls: Sequence[Call]) -> list[LayerParity]:
    """Compare fake-quant and int8 grid by grid; see :class:`qat_lightning.flows.base.Flow`."""
    assert isinstance(prepared, fx.GraphModule) and isinstance(int8, fx.GraphModule)
    found: list[LayerParity] = []
    for call in calls:
        inputs = Surface.found_on(prepared).positional(call.args, call.kwargs)
        recorder = _Recorder(prepared)
        recorder.run(*inputs)
        follower = _Follower(int8, recorder.references)
        follower.run(*inputs)
        found.extend(follower.layers)
    return found


def pack(int8: nn.Module, plan: Plan) -> None:
    """Do nothing: weights are plain integers; see :class:`qat_lightning.flows.base.Flow`."""


def portable_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict, which is plain; see :class:`qat_lightning.flows.base.Flow`."""
    return model.state_dict()


def load_portable_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what :func:`portable_state` returned; see :class:`qat_lightning.flows.base.Flow`."""
    model.load_state_dict(state)


def layers(int8: nn.Module, plan: Plan) -> Iterator[LayerReport]:
    """Yield the layers that run in int8."""
    grids = _grids(int8) if isinstance(int8, fx.GraphModule) else {}
    for name, layer in int8.named_modules():
        if isinstance(layer, Int8Layer | DynamicLinear):
            planned, grid = planned_layer(plan, name), grids.get(name)
            yield LayerReport(
                layer=name,
                engine=planned.kernel.engine if planned else plan.backend,
                activation_bits=planned.kernel.activation_bits if planned else 8,
                weight_bits=planned.kernel.weight_bits if planned else 8,
                per_channel=planned.per_channel if planned else True,
                scale=None if grid is None else float(grid.scale),
                zero_point=None if grid is None else int(grid.zero_point),
            )


def _grids(int8: fx.GraphModule) -> dict[str, Requantize]:
    """Return the grid of the output of each layer."""
    return {owner: grid for node in int8.graph.nodes if (grid := _grid(int8, node)) is not None and (owner := _layer_before(int8, node))}


def _grid(module: fx.GraphModule, node: fx.Node) -> Any:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, Requantize | ActivationFakeQuantize) else None


def _layer_before(int8: fx.GraphModule, node: fx.Node) -> str:
    """Return the name of the layer whose output a grid is for, behind an activation or not; empty where it is for something else."""
    source = node.args[0]
    for _ in range(2):
        if not isinstance(source, fx.Node):
            return ""
        if source.op == "call_module":
            return str(source.target) if isinstance(int8.get_submodule(str(source.target)), Int8Layer) else ""
        source = source.args[0] if source.args else None
    return ""


# --- parity ------------------------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs the fake-quantized graph and keeps what every activation fake-quant returned, by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.references: dict[str, Reference] = {}

    def run_node(self, node: fx.Node) -> Any:
        output = super().run_node(node)
        fake_quant = _grid(self.module, node)  # type: ignore[arg-type]
        if fake_quant is not None and isinstance(output, Tensor):
            scale, zero_point = fake_quant.calculate_qparams()
            qparams = QParams(float(scale.flatten()[0]), int(zero_point.flatten()[0]), q_min=0, q_max=ACTIVATION_MAX)
            self.references[str(node.target)] = Reference(output.detach().float(), qparams)
        return output


class _Follower(fx.Interpreter):
    """Runs the int8 graph, each part between two grids on the fake-quantized values, and compares what it returns with theirs."""

    def __init__(self, module: fx.GraphModule, references: dict[str, Reference]) -> None:
        super().__init__(module)
        self.references = references
        self.layers: list[LayerParity] = []

    def run_node(self, node: fx.Node) -> Any:
        output = super().run_node(node)
        if _grid(self.module, node) is None:  # type: ignore[arg-type]
            return output
        reference, source = self.references[str(node.target)], node.args[0]
        assert isinstance(source, fx.Node) and isinstance(output, Tensor)
        name = _layer_before(self.module, node) or source.name  # type: ignore[arg-type]
        self.layers.append(compare(name, output, reference))
        return reference.value
