"""Flows carry a recipe out on one module; they alone know ``torch.ao`` and ``torch.export``."""

from qat_lightning.flows.base import Flow, get_flow

__all__ = ["Flow", "get_flow"]
