"""Distillation in quantization-aware training: the float model is the teacher of its quantized self.

The loss is the squared error between the outputs of a prepared submodule and of its float twin on the same input, relative to the
mean square of the teacher's (on logits at least as good as the usual divergence of softmaxes: Kim et al. 2021, arXiv:2105.08919). It needs
no labels and suits any output. Its gradient is put in where training computes the gradient of the output, so that neither the
``training_step`` nor the logged loss changes, and several optimizers, manual optimization and DDP work as without it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from qat_lightning.errors import ConfigurationError
from qat_lightning.running import clone

SMALLEST_MEAN_SQUARE = 1e-12


class Distillation:
    """Teaches prepared submodules, from its making until ``stop``.

    Args:
        students: prepared modules by name, on the device they train on.
        teachers: the float modules that they were.
        share: of the gradient that comes from the teacher; the loss has the rest.
        loss_scale: returns what the gradients of the loss are multiplied by, e.g. for gradient accumulation.

    Raises:
        ConfigurationError: a student without a teacher.
    """

    def __init__(
        self, students: Mapping[str, nn.Module], teachers: Mapping[str, nn.Module], share: float, loss_scale: Callable[[], float]
    ) -> None:
        missing = sorted(students.keys() - teachers.keys())
        if missing:
            raise ConfigurationError(
                f"Distillation needs the float model, but {missing} were prepared by another callback: "
                f"fit with the callback that prepared them, or set `distillation=0`."
            )
        self._share, self._loss_scale = share, loss_scale
        self._handles: list[RemovableHandle] = []
        for name, student in students.items():
            self._teach(student, clone(teachers[name]).to(_device_of(student)).eval().requires_grad_(False))

    def stop(self) -> None:
        """Teach no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _teach(self, student: nn.Module, teacher: nn.Module) -> None:
        calls: list[tuple[Any, Any]] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training and torch.is_grad_enabled():
                calls.append((args, kwargs))

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not calls:
                return None
            args, kwargs = calls.pop()
            with torch.no_grad():
                wanted = pytree.tree_leaves(teacher(*args, **kwargs))
            leaves, spec = pytree.tree_flatten(output)
            pairs = zip(leaves, wanted, strict=True)
            return pytree.tree_unflatten([self._with_gradient(leaf, want) for leaf, want in pairs], spec)

        # The first of all hooks: those of a prepared module change the arguments.
        self._handles.append(student.register_forward_pre_hook(keep, prepend=True, with_kwargs=True))
        self._handles.append(student.register_forward_hook(compare, with_kwargs=True))

    def _with_gradient(self, output: Any, wanted: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        error, mean_square = output.detach().float() - wanted.float(), wanted.float().square().mean()
        gradient = 2 * error / (error.numel() * mean_square.clamp(min=SMALLEST_MEAN_SQUARE))
        return _Blend.apply(output, gradient, self._share, self._loss_scale())


class _Blend(torch.autograd.Function):
    """Passes a tensor on, and blends another gradient into that of the loss on the way back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor, share: float, scale: float) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.share, ctx.scale = share, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_loss,), (of_teacher,) = gradients, ctx.saved_tensors
        own = (ctx.share * ctx.scale * of_teacher).to(of_loss.dtype)
        # Not a blend with share 1: zero times infinity is NaN.
        return own if ctx.share == 1 else own + (1 - ctx.share) * of_loss, None, None, None


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
