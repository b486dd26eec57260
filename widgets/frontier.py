"""Static figures, quality against cost and against a knob; HoloViews on matplotlib, so they need no front end."""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.frontier import Point, pareto
from workbench.quality import METRICS

if TYPE_CHECKING:
    import holoviews
    import pandas

# Okabe-Ito and two more; the markers differ too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A68C8", "#999933")
INK = "#777777"  # of text and axes on a page whose ground is not known: 4.2 : 1 on black and on white
MARKERS = ("o", "^", "D", "v", "P", "X", "<", "p")
COSTS = {"flops": "FLOPs per sample", "evaluations": "evaluations per sample"}
_LOOK = {"fontsize": {"title": 11, "labels": 10, "legend": 8.5}, "legend_limit": 1000}
MANY = 3  # more entries than these have their key beside the axes, not within


@dataclass(frozen=True)
class Figure:
    """A figure that shows itself in a notebook. element: the HoloViews object; frame: the numbers drawn."""

    element: holoviews.core.Dimensioned
    frame: pandas.DataFrame

    def render(self, form: str, dpi: int = 110, is_file: bool = True) -> bytes:
        """The figure as "png" or "svg": a file, black on white, or for a page, without a ground of its own."""
        hv = _holoviews()
        figure = hv.render(self.element, backend="matplotlib")
        for axes in figure.axes:
            axes.set_aspect("auto")  # HoloViews' own aspect goes wrong with a logarithmic axis
            axes.set_box_aspect(0.65)
            axes.grid(alpha=0.25)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter("")  # logarithmic axes would name their minor ticks over ours
        if not is_file:
            _for_any_ground(figure)
        out = io.BytesIO()
        figure.savefig(out, format=form, dpi=dpi, bbox_inches="tight", facecolor="white" if is_file else "none")
        return out.getvalue()

    def _repr_png_(self) -> bytes:
        return self.render("png", is_file=False)


def frontier_plot(points: Sequence[Point], metric: str, *, reference: Point | None = None,
                  baseline: Point | None = None, title: str | None = None, cost: str = "flops",
                  label: Callable[[Point], str] | None = None, series: Callable[[Point], str] | None = None,
                  log_y: bool = False) -> Figure:
    """Quality against cost per sample, one marker per setting with its standard error, and the Pareto front as a line.

    points: of `workbench.points`. reference, baseline: points drawn as a star and a square, and named. cost: "flops" or
    "evaluations". label(point): text beside a point, "" for none. series(point): the name under which points share a
    marker, by default the method's. log_y: logarithmic quality; values that are not above 0 are left out there.
    Raises KeyError for an unknown metric or cost.
    """
    import pandas as pd

    hv, m = _holoviews(), METRICS[metric]
    side = "higher is better" if m.higher_is_better else "lower is better"
    x = hv.Dimension(cost, label=COSTS[cost])
    y = hv.Dimension(metric, label=f"{m.label}{f' ({m.unit})' if m.unit else ''}, {side}")
    rows, layers = [], []

    def draw(some: Sequence[Point], name: str, **style: Any) -> None:
        table = [(getattr(p, cost), p.value, p.stderr if p.stderr == p.stderr else 0.0) for p in some]
        rows.extend({"series": name, **_setting(p), cost: p_cost, metric: p.value, "stderr": p.stderr, "n": p.n}
                    for p, (p_cost, _, _) in zip(some, table, strict=True))
        bars = hv.ErrorBars(table, x, [y, "stderr"]).opts(edgecolor=style["color"], linewidth=1.2, capsize=2)
        layers.extend([bars, hv.Scatter(table, x, [y, "stderr"], label=name).opts(**style)])

    rivals = [p for p in (reference, baseline) if p is not None]
    if log_y:
        points, rivals = [p for p in points if p.value > 0], [p for p in rivals if p.value > 0]
        reference, baseline = (p if p in rivals else None for p in (reference, baseline))
    front = pareto([*points, *rivals], metric, "cost" if cost == "flops" else cost)
    layers.append(hv.Curve([(getattr(p, cost), p.value) for p in front], x, y, label="Pareto front").opts(
        color=INK, linestyle="--", linewidth=1.2))
    named = [(series(p) if series else p.runs[0].inputs.method, p) for p in points]
    for k, name in enumerate(sorted({name for name, _ in named})):
        draw([p for own, p in named if own == name and p not in rivals], name, **_marked(k))
    if reference is not None:
        draw([reference], f"reference: {reference.runs[0].inputs.method}", color="#000000", marker="*", s=190)
    if baseline is not None:
        draw([baseline], f"baseline: {baseline.runs[0].inputs.method}", color="#000000", marker="s", s=60)
    if label is not None:
        layers.extend(hv.Text(getattr(p, cost), p.value, "  " + label(p), halign="left", valign="bottom", fontsize=8)
                      for p in points if label(p))
    costs = [getattr(p, cost) for p in [*points, *rivals]] or [1.0]
    low, high = min(costs) / 1.3, max(costs) * 1.3
    overlay = hv.Overlay(layers).opts(
        hv.opts.Overlay(logx=True, title=_literal(title or f"{m.label} against cost"), fig_inches=7, xlim=(low, high),
                        xticks=_log_ticks(low, high), **_LOOK, legend_position="best",
                        **(_log_axis("y", [p.value for p in [*points, *rivals]]) if log_y else {})))
    return Figure(overlay, pd.DataFrame(rows))


def curve_plot(series: Mapping[str, Sequence[tuple[float, float, float]]], *, x_label: str, y_label: str,
               title: str | None = None, published: Mapping[str, Sequence[tuple[float, float]]] | None = None,
               published_label: str | None = None, published_title: str = "as published", log: str = "",
               guides: Sequence[str] = ()) -> Figure:
    """Curves of (x, y, standard error) triples; beside them, on axes of their own, published (x, y) pairs.

    published numbers come from other data, so they are never drawn on our axes: published_label names their y axis.
    log: which axes are logarithmic on both sides, "x", "y" or "xy"; there pairs that are not above 0 are left out.
    guides: names of series that are no results, drawn as thin grey lines with their name at the last point.
    Raises ValueError for another log.
    """
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f"log={log!r}: expected '', 'x', 'y' or 'xy'")
    import pandas as pd

    hv = _holoviews()
    rows = [{"series": name, "source": "ours", x_label: x, y_label: y, "stderr": e}
            for name, triples in series.items() for x, y, e in triples]
    names = [n for n in dict.fromkeys([*series, *(published or {})]) if n not in guides]  # one look on both sides

    def overlay(data: Mapping[str, Sequence[Any]], y_text: str, heading: str) -> Any:
        layers, drawn = [], []
        for name, entries in data.items():
            table = [(e[0], e[1], e[2] if len(e) > 2 and e[2] == e[2] else 0.0) for e in entries
                     if ("x" not in log or e[0] > 0) and ("y" not in log or e[1] > 0)]
            drawn += table
            x, y = hv.Dimension("x", label=x_label), hv.Dimension("y", label=y_text)
            if name in guides:
                layers.append(hv.Curve(table, x, y).opts(color=INK, linewidth=0.9, linestyle="--"))
                layers += [hv.Text(*table[-1][:2], f" {name}", halign="left", fontsize=8) for _ in table[:1]]
                continue
            look = _marked(names.index(name))
            layers += [
                hv.Curve(table, x, y, label=name).opts(color=look["color"], linewidth=1.4, show_legend=False),
                hv.ErrorBars(table, x, [y, "stderr"]).opts(edgecolor=look["color"], linewidth=1.2, capsize=2),
                hv.Scatter(table, x, y, label=name).opts(**look),
            ]
        spans = {axis: [row[i] for row in drawn] for i, axis in enumerate("xy")}
        if guides and drawn:
            spans["x"].append(1.6 * max(spans["x"]))  # room for their names
        scales = {k: v for axis in log for k, v in _log_axis(axis, spans[axis]).items()}
        title = _literal("\n".join(textwrap.wrap(heading, 38)) if published else heading)  # two stand side by side
        return hv.Overlay(layers).opts(hv.opts.Overlay(title=title, fig_inches=5, padding=0.06, **_LOOK, **scales,
                                                       legend_position=_key_place(len(data) - len(guides))))

    figure = overlay(series, y_label, title or f"{y_label} against {x_label}")
    if published:
        rows += [{"series": name, "source": published_title, x_label: x, y_label: y, "stderr": float("nan")}
                 for name, pairs in published.items() for x, y in pairs]
        beside = overlay(published, published_label or y_label, published_title)
        figure = (figure + beside).opts(hv.opts.Layout(sublabel_format="", tight=True, shared_axes=False, hspace=0.3))
    return Figure(figure, pd.DataFrame(rows))


def save_figure(figure: Figure, name: str, folder: str | os.PathLike[str] | None) -> Figure:
    """Write <folder>/<name>.png, .svg and .csv (nothing where folder is empty); returns the figure, to show it.

    Each file is whole or as it was before. Raises ValueError where name is no plain file name.
    """
    if not re.fullmatch(r"[\w-][\w. -]*", name):
        raise ValueError(f"name={name!r}: expected letters, digits, '-', '_', '.' or spaces: a file's name, no path")
    if folder:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("png", figure.render("png", dpi=200)), ("svg", figure.render("svg")),
                                ("csv", figure.frame.to_csv(index=False).encode())):
            part = target / f".{name}.{suffix}.{os.getpid()}.part"
            try:
                part.write_bytes(content)
                os.replace(part, target / f"{name}.{suffix}")
            finally:
                part.unlink(missing_ok=True)
    return figure


def _for_any_ground(figure: Any) -> None:
    """Legible on light and dark pages alike: what is black becomes INK, white grounds become transparent."""
    from matplotlib.collections import Collection
    from matplotlib.colors import to_rgba_array
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        for part in axes.spines.values():
            part.set_edgecolor(INK)
        if legend := axes.get_legend():
            legend.get_frame().set_facecolor("none")
    for text in figure.findobj(Text):
        text.set_color(INK)
    for mark in figure.findobj(lambda artist: isinstance(artist, Collection | Line2D)):
        for part in ("facecolor", "edgecolor") if isinstance(mark, Collection) else ("color", "markeredgecolor"):
            colours = to_rgba_array(getattr(mark, f"get_{part}")())
            if len(colours) and not colours[:, :3].any():
                mark.set(**{part: INK})


def _marked(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "s": 45}


def _literal(title: str) -> str:
    """A title that HoloViews, which takes it for a template, shows as it is."""
    return title.replace("{", "{{").replace("}", "}}")


def _key_place(n_entries: int) -> str:
    return "right" if n_entries > MANY else "best"


def _log_axis(axis: str, values: Sequence[float]) -> dict[str, Any]:
    """Options of a logarithmic axis "x" or "y" that holds these values, all above 0."""
    low, high = (min(values) / 1.4, max(values) * 1.4) if values else (0.1, 10.0)
    return {f"log{axis}": True, f"{axis}lim": (low, high), f"{axis}ticks": _log_ticks(low, high)}


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2 and 5 of each power of ten between low and high; of many powers only the 1, where few lie inside more."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for firsts in ((1,) if len(exponents) > 4 else (1, 2, 5), range(1, 10), [k / 2 for k in range(2, 20)]):
        if len(inside) < 2:
            inside = [d * 10.0**e for e in exponents for d in firsts if low <= d * 10.0**e <= high]
    return [(t, _short(t)) for t in inside]


def _short(value: float) -> str:
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def _holoviews() -> Any:
    """HoloViews on matplotlib, loaded without `hv.extension`, which would write scripts into the notebook."""
    import holoviews as hv
    import holoviews.plotting.mpl

    hv.Store.set_current_backend("matplotlib")
    return hv


def _setting(point: Point) -> dict[str, Any]:
    i = point.runs[0].inputs
    seeds = " ".join(str(r.inputs.seed) for r in point.runs)
    return {"method": i.method, "problem": i.problem, "n_samples": i.n_samples, "seeds": seeds, **i.knobs}
