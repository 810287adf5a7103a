"""From plain mappings (what yaml holds) to dataclasses, strictly.

A setting lives beside the class it sets. `build` turns a mapping into that dataclass and its nested
dataclasses, and refuses what does not fit: an unknown key names the nearest known one, a wrong type says
what was expected and what came. Checks of values belong to `__post_init__` of the dataclass, as `UserError` whose
`where` is the key as the dataclass knows it; `build` puts the path of the dataclass before it.
"""

import inspect
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from megarec.base.errors import UserError, nearest

T = TypeVar("T")


def build(kind: type[T], mapping: Mapping[str, Any], *, where: str = "") -> T:
    """The dataclass `kind` filled from `mapping`.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, None, Literal, list, tuple, dict, Any or dataclasses.
        mapping: keys are field names.
        where: the path of the mapping, for messages: `model.attention`.

    Raises:
        UserError: an unknown key, a missing key, a value of another type, or one that the dataclass refuses.
    """
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in known:
            raise UserError(f"unknown key '{_join(where, str(key))}'", fix=nearest(str(key), list(known)))
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"'{_join(where, name)}' is not set", fix=f"Give {_join(where, name)}=...")
    try:
        return kind(**values)
    except UserError as error:
        raise error.within(where) from None


def plain(config: Any) -> dict[str, Any]:
    """The mapping that `build` turns back into an equal dataclass: lists, dicts and scalars only."""
    result = _plain(asdict(config))
    assert isinstance(result, dict)
    return result


def describe(kind: type, mapping: Mapping[str, Any], *, where: str = "") -> dict[str, str]:
    """What each setting means, by dotted key: the `Attributes` of the docstrings of `kind` and its nested dataclasses.

    Args:
        kind: a dataclass.
        mapping: values, which choose among several dataclasses by their `name`.
        where: the path of the mapping.
    """
    texts: dict[str, str] = {}
    hints = typing.get_type_hints(kind)
    for owner in reversed(kind.__mro__):
        for name, text in _attribute_texts(owner.__doc__ or "").items():
            if name in hints:
                texts[_join(where, name)] = text
    for name, hint in hints.items():
        value = mapping.get(name)
        if isinstance(value, Mapping):
            choices = [k for k in (hint, *typing.get_args(hint)) if is_dataclass(k)]
            chosen = [k for k in choices if getattr(k, "name", None) == value.get("name")] or choices
            if chosen:
                texts |= describe(typing.cast(type, chosen[0]), value, where=_join(where, name))
    return texts


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        path = _join(prefix, str(key))
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def _attribute_texts(docstring: str) -> dict[str, str]:
    """The entries of the `Attributes` (or `Args`) section of a docstring, each on one line."""
    texts: dict[str, str] = {}
    name, inside = "", False
    for line in inspect.cleandoc(docstring).splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            inside = line in ("Attributes:", "Args:")
        elif inside and indent == 4 and ":" in line:
            name, _, text = line.strip().partition(":")
            texts[name] = text.strip()
        elif inside and name:
            texts[name] += " " + line.strip()
    return texts


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) for a in args if a == value):
            raise UserError(f"'{value}' is not allowed", where=where, fix=nearest(str(value), [str(a) for a in args]))
        return value
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a group of settings", value)
        return build(typing.cast(type, kind), value, where=where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(where, "a list", value)
        item = args[0] if args else Any
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise _wrong(where, f"a list of {len(args)}", value)
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        return origin(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, "a mapping", value)
        return {_convert(args[0], k, where): _convert(args[1], v, _join(where, str(k))) for k, v in value.items()}
    return _convert_scalar(kind, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    if isinstance(value, Mapping) and "name" in value:  # dataclasses tell themselves apart by a `name` of their own
        by_name = {f.default: k for k in kinds if is_dataclass(k) for f in fields(k) if f.name == "name"}
        if by_name:
            if value["name"] not in by_name:
                raise UserError(
                    f"'{value['name']}' is not known",
                    where=f"{where}.name",
                    fix=nearest(str(value["name"]), [str(n) for n in by_name]),
                )
            return _convert(by_name[value["name"]], value, where)
    for index, kind in enumerate(kinds):
        try:
            return _convert(kind, value, where)
        except UserError:
            if index == len(kinds) - 1:
                raise
    raise _wrong(where, "a value", value)


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        return _convert_float(value, where)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _wrong(where, kind.__name__, value)


def _convert_float(value: Any, where: str) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # yaml 1.1 reads 1e-3 as text
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise _wrong(where, "a finite number", value)
    return number


def _wrong(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"expected {expected}, got {value!r}", where=where)
