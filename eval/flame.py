"""Flame graphs as SVG that any browser shows by itself: no script, no font or style from outside."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from eval.trace import Folded, Frame

_WIDTH, _ROW, _TOP, _MARGIN = 1600, 18, 64, 10  # pixels
_CHARACTER = 6.7
"""Width of a character of the 11 px monospace font, in pixels, with some room: fonts differ."""
_NARROWEST = 1.0
"""Frames narrower than so many pixels are not drawn: nobody could point at them, and they are most of all frames."""
# Pale, so that the dark text stands out from each by more than 7 to 1.
_FILL = {
    "range": "#e3e3e3",
    "module": "#b9e4d0",
    "Python": "#cfe0f3",
    "operator": "#fbe0b0",
    "CUDA call": "#efd0e4",
    "kernel": "#f7c9b8",
    "node": "#fbe0b0",
}


@dataclass
class _Node:
    total: float = 0.0
    inner: dict[Frame, "_Node"] = field(default_factory=dict)


def flame_graph(folded: Folded, title: str) -> str:
    """The SVG of stacks and the milliseconds spent in each: callers on top, in the order of their first call.

    Width is time. Pointing at a frame shows its whole name, its time and its share of all. Where modules
    are numbered (`h.0`, `h.1`) a second graph adds them up (`h.*`), wide enough to read.
    """
    whole = sum(folded.values())
    drawn: list[str] = []
    panels = {"": folded} | ({"All layers added up": merged} if (merged := _merge_layers(folded)) != folded else {})
    narrow, bottom = 0, _TOP
    for name, stacks in panels.items():
        if name:
            drawn.append(f'<text class="n" x="{_MARGIN}" y="{bottom + _ROW + 12}">{name}</text>')
            bottom += 2 * _ROW
        scale = (_WIDTH - 2 * _MARGIN) / whole if whole else 0.0
        left_out, rows = _draw(_tree(stacks).inner, drawn, _MARGIN, bottom, "", scale, whole)
        narrow, bottom = narrow + left_out, rows
    height = bottom + _MARGIN
    note = f"Width is time, {whole:,.3f} ms in all. Point at a frame for its name, time and share."
    if narrow:
        note += f" {narrow:,} frames too narrow to see are left out."
    style = "text{font:11px monospace;fill:#222}.t{font:bold 15px sans-serif}.n{font:12px sans-serif}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">',
        f"<title>{escape(title)}</title><desc>{escape(note)}</desc>",
        f"<style>{style} rect{{stroke:#fff;stroke-width:.5}} g:hover>rect{{stroke:#222;stroke-width:1}}</style>",
        f'<path fill="#fff" d="M0 0H{_WIDTH}V{height}H0z"/>',
        f'<text class="t" x="{_MARGIN}" y="20">{escape(title)}</text>',
        f'<text class="n" x="{_MARGIN}" y="38">{escape(note)}</text>',
        *_legend({frame.kind for stack in folded for frame in stack}),
        *drawn,
        "</svg>\n",
    ]
    return "\n".join(lines)


def _merge_layers(folded: Folded) -> Folded:
    """The same time, with `h.*` for each of `h.0`, `h.1`, ..."""
    merged: Folded = defaultdict(float)
    for stack, time in folded.items():
        named = (frame._replace(name=re.sub(r"\.\d+(?=\.|$)", ".*", frame.name)) for frame in stack)
        merged[tuple(new if new.kind == "module" else old for new, old in zip(named, stack, strict=True))] += time
    return dict(merged)


def _tree(folded: Folded) -> _Node:
    root = _Node()
    for stack, time in folded.items():
        node = root
        for frame in stack:
            node = node.inner.setdefault(frame, _Node())
            node.total += time
    return root


def _draw(
    level: Mapping[Frame, _Node], drawn: list[str], left: float, top: int, module: str, scale: float, whole: float
) -> tuple[int, int]:
    """Draw frames side by side and what is in them; return how many were too narrow, and where the lowest one ends."""
    narrow, bottom = 0, top
    for frame, node in level.items():
        width = node.total * scale
        if width < _NARROWEST:
            narrow += _count(node)
            continue
        label, inside = frame.name, module
        if frame.kind == "module":
            # Within `transformer.h.3`, `attn` says as much as `transformer.h.3.attn`.
            label, inside = frame.name.removeprefix(f"{module}."), frame.name
        elif frame.kind == "operator":
            label = frame.name.removeprefix("aten::")
        told = f"{frame.name}\n{frame.kind}: {node.total:,.3f} ms, {node.total / whole:.1%}"
        drawn.append(
            f'<g><title>{escape(told)}</title><rect x="{left:.2f}" y="{top}" width="{width:.2f}" '
            f'height="{_ROW - 1}" fill="{_FILL[frame.kind]}"/>{_text(label, left, top, width)}</g>'
        )
        below = _draw(node.inner, drawn, left, top + _ROW, inside, scale, whole)
        narrow, bottom = narrow + below[0], max(bottom, top + _ROW, below[1])
        left += width
    return narrow, bottom


def _count(node: _Node) -> int:
    return 1 + sum(map(_count, node.inner.values()))


def _text(label: str, left: float, top: int, width: float) -> str:
    """The label, as much of it as fits."""
    fits = int((width - 6) / _CHARACTER)
    if fits < 2:
        return ""
    shown = label if len(label) <= fits else label[: fits - 1] + "…"
    return f'<text x="{left + 3:.2f}" y="{top + 12}">{escape(shown)}</text>'


def _legend(kinds: set[str]) -> list[str]:
    """What each colour stands for."""
    parts, left = [], float(_MARGIN)
    for kind in (kind for kind in _FILL if kind in kinds):
        parts.append(
            f'<rect x="{left}" y="46" width="12" height="12" fill="{_FILL[kind]}"/>'
            f'<text class="n" x="{left + 16}" y="56">{kind}</text>'
        )
        left += 40 + 7 * len(kind)
    return parts
