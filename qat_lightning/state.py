"""What a prepared module writes into state dicts and takes from them: its plan, and weights under float names or its own."""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.decoding import parse_json
from qat_lightning.errors import CheckpointError
from qat_lightning.observers import follow_weights, measure_weights
from qat_lightning.plan import LayerPlan, Plan
from qat_lightning.zero_scales import lift_zero_scales

PLAN_KEY = "quantization_plan"
OBSERVER_SWITCH = ".observer_enabled"
FLOAT = "stays float"


def tensor_names(module: nn.Module) -> dict[str, int]:
    """Return the identity of every parameter and buffer by its name in the state dict."""
    return {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


class PreparedState:
    """Hooks on the state dict of a prepared module.

    Saving adds the plan. Loading checks it, or takes a float state dict: fake-quant then stays as it is, and weights are measured.
    Observers stay on or off as they are: a checkpoint of the middle of training would have them learn from whatever runs next.

    Args:
        plan: how the module was prepared.
        before: tensors of the float module by name, from :func:`tensor_names`.
        prepared: the module, which holds the same tensors under other names.
    """

    def __init__(self, plan: Plan, before: Mapping[str, int], prepared: nn.Module) -> None:
        after = {identity: name for name, identity in reversed(tensor_names(prepared).items())}
        self.plan = plan
        self.names = {name: after[identity] for name, identity in before.items() if identity in after}
        self.loaded_float = False
        # Partials, because torch marks its hooks with an attribute, which a method cannot have.
        target: Any = prepared
        target.register_state_dict_post_hook(partial(PreparedState.save, self))
        target.register_load_state_dict_pre_hook(partial(PreparedState.load, self))
        target.register_load_state_dict_post_hook(partial(PreparedState.finish, self))

    @staticmethod
    def of(module: nn.Module) -> "PreparedState | None":
        """Return the hooks of a prepared module, None for any other."""
        owners = (_owner(hook) for hook in module._state_dict_hooks.values())
        return next((owner for owner in owners if owner is not None), None)

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Take the hooks off a module that is prepared no longer."""
        hooks: Any
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if _owner(hook) is not None]:
                del hooks[key]

    def save(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: Any) -> None:
        """Add the plan to a state dict, whose tensors are those of the module."""
        follow_weights(module)
        state[prefix + PLAN_KEY] = encode(self.plan)

    def load(self, module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        """Check the plan in a state dict, or rename the tensors of a float one.

        Raises:
            CheckpointError: the state dict was written by another recipe or flow, or with other layers quantized.
        """
        given = {key.removeprefix(prefix): key for key in list(state) if key.startswith(prefix)}
        if PLAN_KEY in given:
            check_same(decode(state.pop(prefix + PLAN_KEY)), self.plan, prefix.rstrip("."))
            state.update({prefix + name: switch for name, switch in module.state_dict().items() if name.endswith(OBSERVER_SWITCH)})
            return
        own = {name: tensor for name, tensor in module.state_dict().items() if name != PLAN_KEY}
        if not given or given.keys() & (own.keys() - set(self.names.values())):
            return
        values = {name: state.pop(key) for name, key in given.items() if name in self.names}
        state.update({prefix + self.names[name]: value for name, value in values.items()})
        for name in own.keys() - set(self.names.values()):
            state.setdefault(prefix + name, own[name])
        self.loaded_float = True

    def finish(self, module: nn.Module, incompatible: Any) -> None:
        """Measure the weights that a float state dict has brought."""
        if self.loaded_float:
            lift_zero_scales(module)
            measure_weights(module)
        self.loaded_float = False

    def float_weights(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors of the float module out of a state dict of the prepared one; both without a prefix."""
        return {name: state[own] for name, own in self.names.items() if own in state}


def float_weights(prepared: nn.Module) -> dict[str, Any]:
    """Return the tensors of a prepared module under the names they had before."""
    state = PreparedState.of(prepared)
    return {} if state is None else state.float_weights(prepared.state_dict())


def _owner(hook: Any) -> PreparedState | None:
    hook = getattr(hook, "hook", hook)
    owner = hook.args[0] if isinstance(hook, partial) and hook.args else None
    return owner if isinstance(owner, PreparedState) else None


def encode(plan: Plan) -> Tensor:
    """Return the plan as bytes in a tensor, which every way to save weights takes."""
    return torch.frombuffer(bytearray(json.dumps(plan.to_dict()).encode()), dtype=torch.uint8)


def decode(tensor: Any) -> Plan:
    """Return the plan that :func:`encode` wrote.

    Raises:
        CheckpointError: anything else.
    """
    try:
        return Plan.from_dict(parse_json(bytes(tensor.cpu().tolist())))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{PLAN_KEY}` in the checkpoint is no plan that this version reads: {error!r}.") from error


def plans_in(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Plan]]:
    """Yield the names of the prepared modules that a state dict is of, and their plans."""
    for key, value in state.items():
        path, _, last = key.rpartition(".")
        if last == PLAN_KEY and f"{path}.".startswith(prefix):
            yield path.removeprefix(prefix.rstrip(".")).removeprefix("."), decode(value)


def written_by(plan: Plan) -> str:
    """Return how a plan is told of in messages."""
    return f"recipe {plan.recipe!r}, flow {plan.flow!r}, backend {plan.backend!r}"


def check_same(written: Plan, own: Plan, name: str) -> None:
    """Refuse a state dict whose tensors mean something else here; the engine of the kernels may differ.

    Raises:
        CheckpointError: tells which recipe wrote it, and what differs.
    """
    origin = f"The checkpoint was written by {written_by(written)}"
    way_out = "Use the recipe that wrote it, or take its weights alone with QuantizationCallback(..., init_from=FILE)."
    if (written.recipe, written.flow) != (own.recipe, own.flow):
        raise CheckpointError(f"{origin}, but {name!r} is prepared by {written_by(own)}. {way_out}")
    there, here = _settings(written), _settings(own)
    differing = sorted(layer for layer in there.keys() | here.keys() if there.get(layer) != here.get(layer))
    if differing:
        shown = ", ".join(f"{layer!r} {there.get(layer, FLOAT)} there and {here.get(layer, FLOAT)} here" for layer in differing)
        raise CheckpointError(f"{origin} with other settings in {name!r}: {shown}. {way_out}")
    if replace(written, layers={}, backend=own.backend, example=own.example) != replace(own, layers={}):
        raise CheckpointError(f"{origin} with other float modules, groups to fuse or constant arguments in {name!r}. {way_out}")


def _settings(plan: Plan) -> dict[str, str]:
    return {name: _setting(layer) for name, layer in plan.layers.items()}


def _setting(layer: LayerPlan) -> str:
    per = "channel" if layer.per_channel else "tensor"
    return f"has {layer.kernel.activation_bits}-bit inputs and {layer.kernel.weight_bits}-bit weights per {per}"
