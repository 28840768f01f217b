"""What `narsil model inspect` shows of a model."""

import itertools
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table as Grid

from narsil_stream.kernels.artifact import layout, table_layout
from narsil_stream.schemas.model import Architecture, DcnV2, ModelSpec, Table


def described(spec: ModelSpec) -> dict[str, Any]:
    """The description with the sizes that follow from it, as plain data. Sizes in bytes; parameters without scales."""
    slots = layout(spec)
    tables = [msgspec.to_builtins(table) | {"bytes": _bytes(spec, table)} for table in spec.tables]
    return {
        "spec": spec,
        "tables": tables,
        "parameters": sum(slot.values for name, slot in slots.items() if not name.endswith(".scale_bias")),
        "bytes": sum(slot.nbytes for slot in slots.values()),
        "table_bytes": sum(table["bytes"] for table in tables),
    }


def as_table(spec: ModelSpec) -> RenderableType:
    """The same for people. Neighbouring tables of the same kind share a line."""
    facts = described(spec)
    parts: list[RenderableType] = [_overview(spec, facts), _tables(spec)]
    if spec.metrics:
        parts.append(_metrics(spec))
    return Group(*parts)


def size(count: int) -> str:
    """Bytes for people, in decimal units."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"


def _overview(spec: ModelSpec, facts: dict[str, Any]) -> Grid:
    shape = spec.architecture
    grid = Grid(title=f"{spec.name}, version {spec.version}", title_justify="left", show_header=False)
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row("kind", f"DLRM, {_interaction(shape)}, {shape.pooling} pooling")
    grid.add_row("inputs", f"{spec.n_dense} dense, {spec.n_sparse} sparse")
    grid.add_row("preprocessing", spec.preprocessing.kind if spec.preprocessing else "none")
    grid.add_row("bottom MLP", "-".join(map(str, (spec.n_dense, *shape.bottom))))
    if isinstance(shape, DcnV2):
        grid.add_row("cross network", f"{shape.cross_layers} layers of rank {shape.cross_rank}, width {spec.top_input}")
    grid.add_row("top MLP", "-".join(map(str, (spec.top_input, *shape.top))))
    grid.add_row("parameters", f"{facts['parameters']:,}")
    grid.add_row("size", f"{size(facts['bytes'])}, of which tables {size(facts['table_bytes'])}")
    for name, sha256 in spec.files.items():
        grid.add_row(f"sha256 of {name}", sha256)
    return grid


def _interaction(shape: Architecture) -> str:
    return "cross network (DCNv2)" if isinstance(shape, DcnV2) else "dot interaction"


def _tables(spec: ModelSpec) -> Grid:
    grid = Grid(title="tables", title_justify="left")
    for heading in ("name", "rows", "width", "precision", "size"):
        grid.add_column(heading, justify="left" if heading in ("name", "precision") else "right")
    for (rows, dtype), same in itertools.groupby(spec.tables, lambda table: (table.rows, table.dtype)):
        group = list(same)
        name = group[0].name if len(group) == 1 else f"{group[0].name} ... {group[-1].name} ({len(group)})"
        each = f"{rows:,} each" if len(group) > 1 else f"{rows:,}"
        taken = sum(_bytes(spec, table) for table in group)
        grid.add_row(name, each, str(spec.architecture.dim), dtype, size(taken))
    return grid


def _metrics(spec: ModelSpec) -> Grid:
    grid = Grid(title="metrics", title_justify="left", show_header=False)
    for name, value in spec.metrics.items():
        grid.add_row(name, f"{value:,.0f}" if value.is_integer() else f"{value:.4g}")
    return grid


def _bytes(spec: ModelSpec, table: Table) -> int:
    return sum(slot.nbytes for slot in table_layout(table, spec.architecture.dim).values())
