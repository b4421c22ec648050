"""JSON from a stranger: parsed strictly, then turned into dataclasses with every value checked against its annotation."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

SHOWN_CHARACTERS = 60
MAX_DEPTH = 16

T = TypeVar("T")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no UTF-8, no JSON, a key given twice, NaN or infinity, or nested too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_depth(value)
    return value


def decode(kind: type[T], values: Any, path: str = "") -> T:
    """Return a dataclass from what :func:`parse_json` returned.

    Args:
        kind: a dataclass of primitives, ``X | None``, ``Literal``, ``tuple[X, ...]``, ``Mapping[str, X]`` and dataclasses of these.
        values: its fields by name, none missing but those with a default, and none besides.
        path: where ``values`` lies, for messages.

    Raises:
        ValueError: names the place, what was expected and what came.
    """
    return cast(T, _decode(kind, values, path))


def shown(value: Any) -> str:
    """Return a value from a stranger for a message: escaped, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} is given twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError("it is nested too deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin is UnionType:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _decode(inner, value, path)
    if origin is Literal:
        return _decode_choice(arguments, value, path)
    if origin is tuple:
        return tuple(_decode(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(_require(list, value, path)))
    if origin is Mapping:
        return {key: _decode(arguments[1], item, _join(path, key)) for key, item in _require(dict, value, path).items()}
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ValueError(f"`{path}` is too large for a number")
    return _require(kind, value, path)


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    values = _require(dict, value, path)
    kinds = _kinds_of_fields(kind)
    for key in values:
        if key not in kinds:
            raise ValueError(f"`{_join(path, key)}` is no key that this version knows")
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"`{_join(path, field.name)}` is missing")
    decoded = {name: _decode(inner, values[name], _join(path, name)) for name, inner in kinds.items() if name in values}
    try:
        return kind(**decoded)
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}" if path else str(error)) from None


@functools.cache
def _kinds_of_fields(kind: Any) -> dict[str, Any]:
    kinds = get_type_hints(kind)
    return {field.name: kinds[field.name] for field in fields(kind)}


def _decode_choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"`{path}` must be one of {choices}, but is {shown(value)}")
    return value


def _require(kind: Any, value: Any, path: str) -> Any:
    if type(value) is not kind:  # exactly: a bool is an int to isinstance
        raise ValueError(f"`{path}` must be of type {kind.__name__}, but is {shown(value)}")
    return value


def _join(path: str, key: str) -> str:
    short = key if len(key) <= SHOWN_CHARACTERS and key.isprintable() else shown(key)
    return f"{path}.{short}" if path else short
