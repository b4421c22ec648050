"""Finds the user's line behind an error or a graph node."""

import traceback
from pathlib import Path

from torch import fx, nn

_FLOWS = str(Path(__file__).parent)


def line_of_error(error: BaseException) -> str:
    """Return the innermost line of code outside torch and this package, as ``file:line: "code"``."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f'{frames[-1].filename}:{frames[-1].lineno}: "{frames[-1].line}"' if frames else "an unknown line"


def line_of_node(node: fx.Node) -> str:
    """Return the innermost line of code outside torch and this package that made ``node``, as in :func:`line_of_error`."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith('File "') and _is_users(line.split('"')[1])]
    if not places:
        return "an unknown line"
    _, file, rest = lines[places[-1]].split('"', 2)
    number = rest.removeprefix(", line ").partition(",")[0]
    code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
    return f'{file}:{number}: "{code}"'


def module_of_error(error: BaseException, root: nn.Module) -> str:
    """Return the qualified name in ``root`` of the innermost module whose forward was running, empty for the root itself."""
    names = {id(child): name for name, child in root.named_modules()}
    owners = [names.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((name for name in reversed(owners) if name is not None), "")


def short_message(error: BaseException) -> str:
    """Return the type of an error and the first sentence of its message; torch's run to pages."""
    sentence = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {sentence}"


def _is_users(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return "/torch/" not in path and not path.startswith(_FLOWS)
