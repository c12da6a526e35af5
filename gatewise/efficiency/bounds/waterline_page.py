"""The waterline as a self-contained section of a web page: drawings, with each kernel's details on hover."""

from __future__ import annotations

from html import escape
from math import log
from typing import TYPE_CHECKING

from gatewise.efficiency.bounds.waterline_figure import DROP, WATER, Bar, bars, height_range

if TYPE_CHECKING:
    from gatewise.efficiency.bounds.waterline import Bound, Waterline

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 320, 52, 34, 12

STYLE = """
.waterline { font: 14px/1.5 system-ui, sans-serif; max-width: 1000px; color: #1f2933; }
.waterline h2 { font-size: 18px; margin: 0 0 4px; }
.waterline button { font: inherit; padding: 3px 10px; border: 1px solid #ced4da; background: white; cursor: pointer; }
.waterline button[aria-pressed=true] { background: #1971c2; color: white; border-color: #1971c2; }
.waterline svg { width: 100%; height: auto; display: block; }
.waterline svg text { font: 11px system-ui, sans-serif; fill: #364452; }
.waterline svg text { paint-order: stroke; stroke: white; stroke-width: 3px; }
.waterline svg polygon { stroke: white; stroke-width: 0.7px; }
.waterline [data-tip]:hover { opacity: 0.6; }
.waterline figure { margin: 10px 0 0; }
.waterline figure[hidden] { display: none; }
.waterline output { display: block; min-height: 3em; padding-top: 6px; font-variant-numeric: tabular-nums; }
"""

SCRIPT = """
(() => {
  const section = document.currentScript.parentElement;
  const output = section.querySelector('output');
  const idle = output.textContent;
  section.addEventListener('mouseover', (event) => {
    const bar = event.target.closest('[data-tip]');
    output.textContent = bar ? bar.dataset.tip : idle;
  });
  section.addEventListener('mouseleave', () => { output.textContent = idle; });
  for (const button of section.querySelectorAll('button')) {
    button.addEventListener('click', () => {
      for (const other of section.querySelectorAll('button')) other.setAttribute('aria-pressed', other === button);
      for (const figure of section.querySelectorAll('figure')) figure.hidden = figure.dataset.level !== button.value;
    });
  }
})();
"""


def section(waterline: Waterline) -> str:
    """Return a `<section>` with style, drawings, buttons and script in it."""
    levels = [waterline.operators, waterline.epilogues, waterline.blocks]
    buttons = "".join(
        f'<button type="button" value="{bound.level}" aria-pressed="{"false" if place else "true"}">{bound.level}: '
        f"at most {bound.max_efficiency:.1%}</button>"
        for place, bound in enumerate(levels)
    )
    figures = "".join(
        f'<figure data-level="{bound.level}"{" hidden" if place else ""}>{_drawing(bound)}</figure>'
        for place, bound in enumerate(levels)
    )
    about = (
        f"Input {waterline.input_shape}, {waterline.dtype} on {waterline.device}. Bars are kernels: as wide as their "
        "share of the operations, as high as their operations per byte. Those under the waterline wait for memory; "
        "triangles only move data."
    )
    return (
        f'<section class="waterline"><style>{STYLE}</style><h2>Waterline of {escape(waterline.name)}</h2>'
        f"<p>{escape(about)}</p><div>{buttons}</div>{figures}<output>Point at a kernel.</output>"
        f"<script>{SCRIPT}</script></section>"
    )


def _drawing(bound: Bound) -> str:
    low, high = height_range(bound)

    def y(intensity: float) -> float:
        share = log(intensity / low) / log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    scale = WIDTH - LEFT - 10
    slowest = max((entry.min_s for entry in bound.drops), default=0.0)
    base, ridge = y(low), y(bound.ridge)
    marks = [
        f'<rect x="{LEFT}" y="{ridge:.1f}" width="{scale}" height="{base - ridge:.1f}" fill="{WATER}" opacity="0.08"/>'
    ]
    for bar in bars(bound):
        x = LEFT + bar.left * scale
        tip = escape(_tip(bar), quote=True)
        if bar.entry.is_drop:
            size = 3 + 6 * (bar.entry.min_s / slowest if slowest else 0) ** 0.5
            points = f"{x - size:.1f},{base - 2 * size:.1f} {x + size:.1f},{base - 2 * size:.1f} {x:.1f},{base:.1f}"
            marks.append(f'<polygon points="{points}" fill="{DROP}" data-tip="{tip}"/>')
            continue
        top = y(bar.entry.kernel.intensity)
        box = f'x="{x:.2f}" y="{top:.1f}" width="{max(bar.width * scale, 0.5):.2f}" height="{base - top:.1f}"'
        marks.append(f'<rect {box} fill="{bar.color}" stroke="white" stroke-width="0.4" data-tip="{tip}"/>')
    marks.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{ridge:.1f}" y2="{ridge:.1f}" stroke="{WATER}"/>')
    marks.append(f'<text x="{WIDTH - 12}" y="{ridge - 4:.1f}" text-anchor="end">ridge {bound.ridge:.1f}</text>')
    power = 10.0 ** round(log(low, 10))
    while power < high:
        if power > low:
            marks.append(f'<text x="{LEFT - 6}" y="{y(power) + 4:.1f}" text-anchor="end">{power:g}</text>')
        power *= 10
    marks.append(
        f'<text x="{LEFT}" y="{HEIGHT - 10}">operations per byte, over the share of operations in order</text>'
    )
    label = f"waterline, kernels are {bound.level}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _tip(bar: Bar) -> str:
    entry, kernel = bar.entry, bar.entry.kernel
    where = f"{kernel.module or 'the network'}: {kernel.name}"
    moved = f"{kernel.bytes / 1e6:,.3g} MB, at least {1e6 * entry.min_s:,.3g} us"
    if entry.is_drop:
        return f"{where}; {moved}; moves data only"
    lost = f"waits for memory, loses {entry.loss:.2f}x" if entry.is_memory_bound else "bound by arithmetic"
    return f"{where}; {kernel.ops / 2e6:,.4g} M MACs, {moved}; {kernel.intensity:.3g} op:byte; {lost}"
