"""An int8 model as a list of operators: what a trace of it does, in JSON, without a line of its code."""

from qat_lightning.program.execution import compile_program
from qat_lightning.program.nodes import Program
from qat_lightning.program.recording import record

__all__ = ["Program", "compile_program", "record"]
