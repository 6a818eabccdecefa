"""Pictures of a network, before and after fusion, as Keras users know them from plot_model.

SVG needs nothing, PNG needs Pillow, and DOT is text for graphviz. The longest way through the
network is one column; what runs beside it, such as projections, stands to its right; shortcuts are
arcs on its left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from ..errors import MissingDependencyError
from ..files import atomic_write, check_target
from . import fold, plan, trace
from .ir import Call, Graph, Input, Operation
from .plan import Plan, Shape, describe, fallback_reason, output_shape

Point: TypeAlias = tuple[float, float]

BOX_WIDTH, BOX_HEIGHT, ROW, COLUMN, MARGIN = 290, 40, 62, 330, 30
ARC_STEP, ARC_MOST = 9, 130
FUSED, LEFT, OTHER = "#dbeafe", "#fde68a", "#f3f4f6"
FORMATS = (".svg", ".png", ".dot")


@dataclass(frozen=True)
class Box:
    """A step of the picture: its name, its two lines of text, its colour and what it reads."""

    name: str
    title: str
    detail: str
    fill: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """A cubic Bezier curve; the first and the last point are its ends."""

    points: tuple[Point, Point, Point, Point]

    def at(self, t: float) -> Point:
        """The point at parameter ``t`` in [0, 1]."""
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * p[i] for w, p in zip(weights, self.points, strict=True)) for i in (0, 1))
        return x, y


@dataclass(frozen=True)
class Drawing:
    """Boxes by the position of their upper left corner, and curves between them."""

    boxes: tuple[tuple[Box, Point], ...]
    curves: tuple[Curve, ...]
    size: Point


def plot_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    fused: bool = True,
    input_size: Sequence[int] | None = None,
) -> Path:
    """Draw a network into a file.

    Args:
        model: what torch.fx can trace, or a fused model.
        path: ends in ``.svg``, ``.png`` or ``.dot``.
        fused: draw the steps that inference runs, or else the modules as they were written.
        input_size: (N, C, H, W); each box then says the shape of its result, where it is known.

    Returns:
        the path.

    Raises:
        ValueError: another suffix, or ``fused=False`` of a fused model.
        OSError: the file cannot be written; noticed before the network is traced.
        MissingDependencyError: a ``.png`` without Pillow.
        TraceError: the model's Python cannot be recorded.
    """
    path = Path(path)
    check_before(path)
    boxes = _boxes(model, fused, input_size)
    if path.suffix == ".dot":
        data = dot(boxes).encode()
    elif path.suffix == ".svg":
        data = svg(drawing(boxes)).encode()
    else:
        data = png(drawing(boxes))
    atomic_write(path, data)
    return path


def check_before(path: Path) -> None:
    """Raises what :func:`plot_model` says of paths, and of Pillow, before any work is done."""
    check_target(path, FORMATS)
    if path.suffix == ".png":
        _pillow()


def _boxes(model: nn.Module, fused: bool, input_size: Sequence[int] | None) -> list[Box]:
    found: Any = getattr(model, "traced", None)
    if not isinstance(found, Plan):
        graph = trace.trace(model)
        if not fused:
            return list(_graph_boxes(graph, input_size))
        found = plan.build(fold.fold(graph))
    elif not fused:
        raise ValueError("a fused model has no unfused view; draw its source")
    return list(_plan_boxes(found, input_size))


def _plan_boxes(found: Plan, input_size: Sequence[int] | None) -> Iterator[Box]:
    shapes = found.shapes(tuple(input_size)) if input_size else {}
    for parameter in found.parameters:
        yield Box(parameter.name, "input", _shape_text(shapes.get(parameter.name)), OTHER, ())
    for step in found.steps:
        if isinstance(step.op, Call) and step.op.kind == "get_attr":
            continue
        fill = LEFT if fallback_reason(step.op) else FUSED
        detail = _detail(step.where or step.name, shapes.get(step.name))
        yield Box(step.name, describe(step.op), detail, fill, step.inputs)


def _graph_boxes(graph: Graph, input_size: Sequence[int] | None) -> Iterator[Box]:
    shapes: dict[str, Shape | None] = {}
    for node in graph.nodes:
        if isinstance(node.op, Input):
            shapes[node.name] = tuple(input_size) if input_size else None
            yield Box(node.name, "input", _shape_text(shapes[node.name]), OTHER, ())
            continue
        shapes[node.name] = output_shape(node.op, [shapes.get(name) for name in node.inputs])
        detail = _detail(node.where or node.name, shapes[node.name])
        yield Box(node.name, _plain_title(node.op), detail, OTHER, node.inputs)


def _plain_title(op: Operation) -> str:
    return describe(op).removeprefix("PyTorch ")


def _detail(where: str, shape: Shape | None) -> str:
    return " ".join(part for part in (where, _shape_text(shape)) if part)


def _shape_text(shape: Shape | None) -> str:
    return "" if shape is None else f"({', '.join(map(str, shape))})"


def dot(boxes: Sequence[Box]) -> str:
    """The picture in graphviz' language: ``dot -Tpdf model.dot``."""
    names = {box.name: f"n{index}" for index, box in enumerate(boxes)}
    lines = ["digraph model {", '  node [shape=box, style="rounded,filled", fontname=Helvetica];']
    for box in boxes:
        label = "\\n".join(_quoted(text) for text in (box.title, box.detail) if text)
        lines.append(f'  {names[box.name]} [label="{label}", fillcolor="{box.fill}"];')
    for source, target in _edges(boxes):
        lines.append(f"  {names[source]} -> {names[target]};")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _edges(boxes: Sequence[Box]) -> Iterator[tuple[str, str]]:
    known = {box.name for box in boxes}
    for box in boxes:
        for source in dict.fromkeys(box.inputs):
            if source in known:
                yield source, box.name


def drawing(boxes: Sequence[Box]) -> Drawing:
    """Where everything goes."""
    edges = list(_edges(boxes))
    levels = _levels(boxes, edges)
    columns = _columns(boxes, edges, levels)
    spans = [levels[b] - levels[a] for a, b in edges if columns[a] == columns[b] == 0]
    left = MARGIN + min(ARC_MOST, ARC_STEP * max([0, *spans]))
    corners = {
        box.name: (left + COLUMN * columns[box.name], MARGIN + ROW * levels[box.name])
        for box in boxes
    }
    curves = [
        _curve(corners[a], corners[b], arc=columns[a] == columns[b] and levels[b] > levels[a] + 1)
        for a, b in edges
    ]
    width = max(x for x, _ in corners.values()) + BOX_WIDTH + MARGIN
    height = max(y for _, y in corners.values()) + BOX_HEIGHT + MARGIN
    placed = tuple((box, corners[box.name]) for box in boxes)
    return Drawing(placed, tuple(curves), (width, height))


def _levels(boxes: Iterable[Box], edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Each box below all that it reads."""
    sources: dict[str, list[str]] = {}
    for source, target in edges:
        sources.setdefault(target, []).append(source)
    levels: dict[str, int] = {}
    for box in boxes:
        levels[box.name] = 1 + max((levels[s] for s in sources.get(box.name, ())), default=-1)
    return levels


def _columns(
    boxes: Sequence[Box], edges: Iterable[tuple[str, str]], levels: Mapping[str, int]
) -> dict[str, int]:
    """0 for the longest way that ends in the last box, the next free one for the others."""
    sources: dict[str, list[str]] = {}
    for source, target in edges:
        sources.setdefault(target, []).append(source)
    main: set[str] = set()
    name: str | None = max(boxes, key=lambda box: levels[box.name]).name
    while name is not None:
        main.add(name)
        name = max(sources.get(name, ()), key=lambda s: levels[s], default=None)
    columns: dict[str, int] = {}
    taken: dict[int, int] = {}
    for box in boxes:
        level = levels[box.name]
        if box.name in main:
            columns[box.name] = 0
        else:
            taken[level] = columns[box.name] = taken.get(level, 0) + 1
    return columns


def _curve(source: Point, target: Point, *, arc: bool) -> Curve:
    """From below one box to above the next, or round those in between on the left."""
    (ax, ay), (bx, by) = source, target
    if arc:
        start, end = (ax, ay + BOX_HEIGHT / 2), (bx, by + BOX_HEIGHT / 2)
        reach = min(ARC_MOST, ARC_STEP * (by - ay) / ROW) * 4 / 3
        return Curve((start, (ax - reach, start[1]), (bx - reach, end[1]), end))
    start, end = (ax + BOX_WIDTH / 2, ay + BOX_HEIGHT), (bx + BOX_WIDTH / 2, by)
    bend = (end[1] - start[1]) / 2
    return Curve((start, (start[0], start[1] + bend), (end[0], end[1] - bend), end))


def svg(picture: Drawing) -> str:
    """The drawing as a stand-alone SVG document."""
    width, height = picture.size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#4b5563"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for curve in picture.curves:
        a, b, c, d = (f"{x:.1f} {y:.1f}" for x, y in curve.points)
        parts.append(
            f'<path d="M{a}C{b} {c} {d}" fill="none" stroke="#4b5563" marker-end="url(#tip)"/>'
        )
    for box, (x, y) in picture.boxes:
        middle = x + BOX_WIDTH / 2
        parts.append(
            f'<g><rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
            f'fill="{box.fill}" stroke="#6b7280"/>'
            f'<text x="{middle:.1f}" y="{y + 17:.1f}" font-size="13" text-anchor="middle">'
            f"{escape(box.title)}</text>"
            f'<text x="{middle:.1f}" y="{y + 33:.1f}" font-size="11" fill="#4b5563" '
            f'text-anchor="middle">{escape(box.detail)}</text></g>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingDependencyError(
            f"a .png needs Pillow, which cannot be imported ({error}); install fastres[vision], "
            "or ask for .svg or .dot"
        ) from error
    return Image, ImageDraw, ImageFont


def png(picture: Drawing) -> bytes:
    """The drawing as a PNG file. Raises MissingDependencyError without Pillow."""
    import io

    Image, ImageDraw, ImageFont = _pillow()
    width, height = map(round, picture.size)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for curve in picture.curves:
        line = [curve.at(i / 24) for i in range(25)]
        draw.line(line, fill="#4b5563", width=1)
        draw.polygon(_arrow(line[-2], line[-1]), fill="#4b5563")
    large, small = ImageFont.load_default(13), ImageFont.load_default(11)
    for box, (x, y) in picture.boxes:
        corners = (x, y, x + BOX_WIDTH, y + BOX_HEIGHT)
        draw.rounded_rectangle(corners, 6, box.fill, "#6b7280")
        middle = x + BOX_WIDTH / 2
        draw.text((middle, y + 12), box.title, "black", large, anchor="mm")
        draw.text((middle, y + 29), box.detail, "#4b5563", small, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _arrow(before: Point, tip: Point) -> list[Point]:
    """A triangle at the end of a line."""
    dx, dy = tip[0] - before[0], tip[1] - before[1]
    length = max((dx * dx + dy * dy) ** 0.5, 1e-9)
    ux, uy = dx / length, dy / length
    base = (tip[0] - 7 * ux, tip[1] - 7 * uy)
    side = (-uy * 3.5, ux * 3.5)
    return [tip, (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1])]
