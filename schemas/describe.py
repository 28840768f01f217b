"""Structs as JSON Schema, with the docstrings of their fields: draft 7 for AsyncAPI 3.0, or 2020-12 for OpenAPI 3.1.

msgspec's own schemas leave positions without names and call raw bytes base64, which is true of JSON only: a Struct that
is an array in msgpack is described here as that array, item by item.
"""

import ast
import functools
import inspect
import textwrap
from itertools import pairwise
from typing import Any, TypeAlias

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.inspect import (
    AnyType,
    BoolType,
    DictType,
    Field,
    FloatType,
    IntType,
    ListType,
    LiteralType,
    MemoryViewType,
    NoneType,
    RawType,
    StrType,
    StructType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

Schema: TypeAlias = dict[str, Any]

REF = "#/components/schemas/"
CONSTRAINTS = {
    "ge": "minimum",
    "le": "maximum",
    "pattern": "pattern",
    "min_length": "minLength",
    "max_length": "maxLength",
}
ITEMS = {"min_length": "minItems", "max_length": "maxItems"}


def components(*roots: type[Struct]) -> dict[str, Schema]:
    """A schema for each of these Structs and for all that they hold, by class name."""
    found: dict[str, Schema] = {}
    waiting = [type_info(root) for root in roots]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, StructType) and kind.cls.__name__ not in found:
            found[kind.cls.__name__] = _struct(kind)
            waiting += [field.type for field in kind.fields]
        waiting += _parts(kind)
    return dict(sorted(found.items()))


def in_2020_12(schema: Any) -> Any:
    """The same in the newer dialect, which says otherwise how the items of a tuple are given."""
    if isinstance(schema, list):
        return [in_2020_12(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("items"), list):
        items = {"prefixItems": schema["items"], "items": schema["additionalItems"]}
        schema = {name: value for name, value in schema.items() if name not in ("items", "additionalItems")} | items
    return {name: in_2020_12(value) for name, value in schema.items()}


def ref(kind: type[Struct]) -> Schema:
    return {"$ref": REF + kind.__name__}


def as_json(value: object) -> Any:
    """A value as it looks in a JSON document; raw bytes become base64."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _parts(kind: Type) -> list[Type]:
    match kind:
        case VarTupleType() | ListType():
            return [kind.item_type]
        case DictType():
            return [kind.key_type, kind.value_type]
        case UnionType():
            return list(kind.types)
    return []


def _struct(kind: StructType) -> Schema:
    said = inspect.cleandoc(kind.cls.__doc__ or "")
    head: Schema = {"title": kind.cls.__name__} | ({"description": said} if said else {})
    return head | (_array(kind) if kind.array_like else _object(kind))


def _array(kind: StructType) -> Schema:
    """Tuples grow at their end: who reads them passes over items that it does not know."""
    tag = [] if kind.tag is None else [{"title": "tag", "const": kind.tag}]
    required = sum(field.required for field in kind.fields)
    return {
        "type": "array",
        "items": tag + [_field(kind, field) for field in kind.fields],
        "minItems": len(tag) + required,
        "additionalItems": True,
    }


def _object(kind: StructType) -> Schema:
    tag = {} if kind.tag_field is None else {kind.tag_field: {"const": kind.tag}}
    schema: Schema = {
        "type": "object",
        "properties": tag | {field.encode_name: _field(kind, field) for field in kind.fields},
        "required": [*tag, *(field.encode_name for field in kind.fields if field.required)],
    }
    return schema | ({"additionalProperties": False} if kind.forbid_unknown_fields else {})


def _field(kind: StructType, field: Field) -> Schema:
    schema = _schema(field.type)
    if "$ref" in schema:  # what stands beside a $ref is not read
        schema = {"allOf": [schema]}
    if kind.array_like:
        schema["title"] = field.encode_name
    said = _docstrings(kind.cls).get(field.name)
    if said:
        schema["description"] = said
    if field.default is not NODEFAULT:
        schema["default"] = as_json(field.default)
    return schema


def _schema(kind: Type) -> Schema:
    match kind:
        case StructType():
            return ref(kind.cls)
        case BoolType():
            return {"type": "boolean"}
        case IntType():
            return {"type": "integer"} | _constraints(kind, CONSTRAINTS)
        case FloatType():
            return {"type": "number"} | _constraints(kind, CONSTRAINTS)
        case StrType():
            return {"type": "string"} | _constraints(kind, CONSTRAINTS)
        case MemoryViewType():
            return {"type": "string", "format": "binary"}
        case VarTupleType() | ListType():
            return {"type": "array", "items": _schema(kind.item_type)} | _constraints(kind, ITEMS)
        case DictType():
            return {"type": "object", "additionalProperties": _schema(kind.value_type)}
        case LiteralType():
            return {"enum": list(kind.values)}
        case UnionType():
            return {"anyOf": [_schema(part) for part in kind.types]}
        case NoneType():
            return {"type": "null"}
        case RawType():
            return {"type": "array"}
        case AnyType():
            return {}
    raise TypeError(f"no schema for {kind}")


def _constraints(kind: Type, names: dict[str, str]) -> Schema:
    said = {name: getattr(kind, attribute, None) for attribute, name in names.items()}
    return {name: value for name, value in said.items() if value is not None}


@functools.cache
def _docstrings(kind: type) -> dict[str, str]:
    """The string below each field, those that are inherited too."""
    if not issubclass(kind, Struct) or kind is Struct:
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    said = dict(_docstrings(kind.__base__))
    for field, below in pairwise(tree.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                said[name] = inspect.cleandoc(text)
    return said
