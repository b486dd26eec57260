"""The panel on draft trees: Sequoia's of a budget, beside fixed widths and a chain, and the fastest for given costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from widgets.frontier import COLOURS
from widgets.panel import Drawing, LivePanel, Slider, Stop, Values, in_ms, several, steps
from widgets.view import Pane, curve
from workbench.problems.decoding import Decoding, rank_acceptance
from workbench.speculation.engine import Warp
from workbench.speculation.speed import CostCurve, Speedup, predict_speed
from workbench.speculation.trees import Shape, best_tree, chain, expected_tokens, sequoia
from workbench.speculation.trees import widths as tree_of_widths

RANKS, MAX_NODES, MAX_DEPTH = 8, 64, 16


def tree_explorer(problem: Decoding | None = None, *, draft: str = "best", temperature: float = 1.0,
                  first: float = 0.6, decay: float = 0.6, n_nodes: int = 16, max_depth: int = 6,
                  target_seconds: CostCurve | None = None, draft_seconds: float | None = None,
                  draft_cost: float = 0.1, token_cost: float = 0.02) -> LivePanel:
    """The draft tree of a budget, live: Sequoia's, beside the best fixed widths and a chain of the same budget.

    With a problem, acceptance by rank is measured at its `positions` and follows the temperature; without, the first
    draft of a node is accepted with probability `first`, and each further one, where those before it were not, with
    `decay` times the probability of its forerunner. target_seconds: a measured curve T(n) of 1 to at least 65 tokens,
    best of `measure_engine`, whose spread is shown as an interval; without, T(n) = 1 + token_cost (n - 1).
    draft_seconds: of a draft pass; without, draft_cost times T(1). Speed is beside plain decoding at T(1).
    numbers: "tree", "expected", "speed" per tree, "best". Raises ValueError naming an argument that cannot be.
    """
    if draft_seconds is not None and not 0 < draft_seconds < math.inf:
        raise ValueError(f"draft_seconds={draft_seconds!r}: expected positive seconds")
    if target_seconds is not None:
        target_seconds(MAX_NODES + 1), target_seconds(1)  # says now what it was not measured for
    sliders = [
        Slider("temperature", "temperature", steps(0, 2, 0.05), temperature, "divides the logits of both models"),
    ] if problem is not None else [
        Slider("first", "first draft accepted", steps(0.05, 0.95, 0.05), first, "acceptance of a node's first draft"),
        Slider("decay", "decay", steps(0, 1, 0.05), decay,
               "acceptance of a further draft, those before it rejected, over that of its forerunner")]
    sliders += [
        Slider("n_nodes", "budget", tuple(range(1, MAX_NODES + 1)), n_nodes, "drafts per target pass", " nodes"),
        Slider("max_depth", "depth at most", tuple(range(1, MAX_DEPTH + 1)), max_depth,
               "levels, which is draft passes per block", " levels")]
    if draft_seconds is None:
        sliders.append(Slider("draft_cost", "draft pass", steps(0.005, 0.5, 0.005), draft_cost,
                              "seconds of a draft pass; T(1) is a target pass of one token", " T(1)"))
    if target_seconds is None:
        sliders.append(Slider("token_cost", "a further token", steps(0, 1, 0.01), token_cost,
                              "seconds that a further token adds to a target pass", " T(1)"))

    @lru_cache(maxsize=64)
    def measured(at: float) -> tuple[float, ...]:
        assert problem is not None
        return rank_acceptance(problem, draft, Warp(at), RANKS)

    def draw(values: Values, is_late: Stop) -> Iterator[Drawing]:
        begin = time.perf_counter()
        ranks = ranks_of(values["first"], values["decay"]) if problem is None else measured(values["temperature"])
        got = time.perf_counter() - begin
        cost = target_seconds or (lambda n: 1 + values["token_cost"] * (n - 1))
        per_pass = draft_seconds if draft_seconds is not None else values["draft_cost"] * cost(1)
        yield _trees(problem.name if problem else "", ranks, values, cost, per_pass, target_seconds is not None, got)

    return LivePanel("trees", sliders, draw)


def ranks_of(first: float, decay: float) -> tuple[float, ...]:
    """Acceptance by rank (RANKS,): the k-th draft is accepted with first * decay^k where those before it were not."""
    ranks, left = [], 1.0
    for k in range(RANKS):
        ranks.append(left * first * decay**k)
        left -= ranks[-1]
    return tuple(ranks)


@lru_cache(maxsize=512)
def sequoia_within(ranks: tuple[float, ...], n_nodes: int, max_depth: int) -> Shape:
    """Sequoia's tree of n_nodes, or of as many as these ranks and levels hold."""
    fits = sum(len(ranks) ** level for level in range(1, max_depth + 1))
    return sequoia(ranks, min(n_nodes, fits), max_depth)


@lru_cache(maxsize=512)
def best_widths(ranks: tuple[float, ...], n_nodes: int, max_depth: int) -> tuple[int, ...]:
    """SpecInfer's widths per level that yield most tokens within a budget, of all there are; as few nodes as do."""
    reach = np.cumsum(ranks).tolist()
    best: tuple[float, int, tuple[int, ...]] = (1.0, 0, ())
    stack: list[tuple[float, float, int, int, tuple[int, ...]]] = [(1.0, 1.0, 1, 0, ())]
    while stack:
        expected, alive, level, nodes, found = stack.pop()
        if (expected, -nodes) > (best[0] + 1e-12, -best[1]):
            best = (expected, nodes, found)
        for width in range(1, len(reach) + 1):
            size = level * width
            if len(found) == max_depth or nodes + size > n_nodes:
                break
            here = alive * reach[width - 1]
            stack.append((expected + here, here, size, nodes + size, (*found, width)))
    return best[2]


def _trees(where: str, ranks: tuple[float, ...], values: Values, cost: Callable[[int], float], per_pass: float,
           is_measured: bool, got: float) -> Drawing:
    begin = time.perf_counter()
    budget, depth = int(values["n_nodes"]), int(values["max_depth"])
    fixed = best_widths(ranks, budget, depth)

    def trees(n: int) -> dict[str, Shape]:
        return {"Sequoia": sequoia_within(ranks, n, depth),
                "fixed widths": tree_of_widths(best_widths(ranks, n, depth)), "chain": chain(min(n, depth))}

    shapes = trees(budget)
    aware, speed = best_tree(ranks, cost, per_pass, MAX_NODES, MAX_DEPTH)
    plain = cost(1)
    unit, scale = ("tokens/s", 1.0) if is_measured else ("× plain", plain)
    expected = {name: expected_tokens(shape, ranks) for name, shape in shapes.items()}
    predicted = {name: predict_speed(expected[name], shape, cost, per_pass) for name, shape in shapes.items()}
    speeds = {name: found.tokens_per_second * scale for name, found in predicted.items()}
    ladder = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, budget, aware.n_nodes or 1})
    along: dict[str, list[tuple[int, float, float]]] = {name: [] for name in shapes}
    for n in ladder:
        for name, shape in trees(n).items():
            tokens = expected_tokens(shape, ranks)
            along[name].append((n, tokens, predict_speed(tokens, shape, cost, per_pass).tokens_per_second * scale))
    spent = time.perf_counter() - begin
    best = (aware.n_nodes, expected_tokens(aware, ranks), speed * scale)
    fastest = predict_speed(best[1], aware, cost, per_pass)
    begin = time.perf_counter()
    heads = ("tree", "nodes", "draft passes", "tokens per target pass", f"speed ({unit})")
    names = {"Sequoia": "Sequoia's", "fixed widths": f"widths {', '.join(map(str, fixed)) or 'none'}", "chain": "chain"}
    rows = [(names[k], s.n_nodes, len(s.draft_widths), f"{expected[k]:.3f}",
             _with_interval(predicted[k], scale)) for k, s in shapes.items()]
    rows += [("★ fastest here", aware.n_nodes, len(aware.draft_widths), f"{best[1]:.3f}",
              _with_interval(fastest, scale)),
             ("no draft", 0, 0, "1.000", f"{scale / plain:.3g}")]
    said = (f"★ the fastest tree for these costs: {several(aware.n_nodes, 'node')} on {several(aware.depth, 'level')}"
            if aware.n_nodes else "★ no tree pays at these costs: draft nothing")
    if aware.n_nodes and fastest.interval[0] <= 1:
        said += (f"; {fastest.interval[0]:.2f} to {fastest.interval[1]:.2f} times plain decoding, so what was measured "
                 "does not tell whether it pays")
    panes = [tree_picture(shapes["Sequoia"], ranks, "Sequoia", 600, 250, wide=True, caption=(
                "Sequoia's tree; a node's size is the chance that it is accepted with all above it")),
             tree_picture(shapes["fixed widths"], ranks, "fixed widths", 290, 130, caption=(
                 "the best fixed widths within the budget")),
             tree_picture(shapes["chain"], ranks, "chain", 290, 130, caption="a chain within the budget and depth"),
             _lines(along, 1, budget, None, "tokens per target pass"),
             _lines(along, 2, budget, best, f"predicted speed, {unit}"),
             Pane("fastest", "table", {"head": heads, "rows": rows, "strong": said, "wide": True})]
    listed = ", ".join(f"{a:.3f}" for a in ranks[:4])
    status = (f"accepted by rank: {listed}, …; {'measured in ' + in_ms(got) if where else 'given'}; "
              f"trees {in_ms(spent)}; drawing {in_ms(time.perf_counter() - begin)}")
    title = (f"{several(shapes['Sequoia'].n_nodes, 'node')} · {several(shapes['Sequoia'].depth, 'level')} · "
             f"{expected['Sequoia']:.2f} tokens per target pass" + (f" · {where}" if where else ""))
    code = ("from workbench.speculation.trees import expected_tokens, sequoia\n"
            f"ranks = {tuple(round(a, 6) for a in ranks)}\n"
            f"shape = sequoia(ranks, {shapes['Sequoia'].n_nodes}, {depth})\n"
            "print(shape.parents, expected_tokens(shape, ranks))")
    numbers = {"ranks": ranks, "trees": shapes, "expected": expected, "speed": speeds, "best": (aware, best[2]),
               "widths": fixed}
    key = f"{hash((ranks, budget, depth, per_pass, cost(2), cost(MAX_NODES)))}"
    return Drawing(title, panes, status, key, code, numbers)


def _with_interval(found: Speedup, scale: float) -> str:
    """The tokens per second, and their interval where the seconds have one."""
    low, high = (found.expected_tokens / seconds * scale for seconds in reversed(found.block))
    text = f"{found.tokens_per_second * scale:.3g}"
    return text if high - low < 1e-9 * high else f"{text} ({low:.3g} to {high:.3g})"


def reached(shape: Shape, ranks: Sequence[float]) -> list[float]:
    """The chance of each node that it is accepted with all above it."""
    out: list[float] = []
    for parent, rank in zip(shape.parents, shape.ranks, strict=True):
        out.append((ranks[rank] if rank < len(ranks) else 0.0) * (out[parent] if parent >= 0 else 1.0))
    return out


def tree_picture(shape: Shape, ranks: Sequence[float], name: str, width: int, height: int, **told: Any) -> Pane:
    """The context at the left, a level of drafts per column, first children above."""
    order: dict[int, float] = {}
    n_leaves, stack = 0, [-1]
    while stack:  # leaves get rows from top to bottom
        node = stack.pop()
        below = shape.children(node)
        if not below:
            order[node] = n_leaves
            n_leaves += 1
        stack.extend(reversed(below))
    for node in range(shape.n_nodes - 1, -2, -1):  # children come after their parent
        if below := shape.children(node):
            order[node] = (order[below[0]] + order[below[-1]]) / 2
    chance = reached(shape, ranks)

    def place(node: int) -> tuple[float, float]:
        level = 0 if node < 0 else shape.depths[node]
        return (16 + (width - 36) * level / max(shape.depth, 1), 12 + (height - 24) * (order[node] + 0.5) / n_leaves)

    said = f"{shape.n_nodes} nodes on {shape.depth} levels, {', '.join(map(str, shape.widths))} per level"
    parts = [f"<svg role='img' data-testid='tree-{name.replace(' ', '-')}' data-nodes='{shape.n_nodes}' "
             f"aria-label='{said}' viewBox='0 0 {width} {height}' class='wba-picture' fill='currentColor'>"]
    for node, parent in enumerate(shape.parents):
        (x, y), (u, v) = place(parent), place(node)
        parts.append(f"<path d='M{x:.1f},{y:.1f}C{(x + u) / 2:.1f},{y:.1f} {(x + u) / 2:.1f},{v:.1f} {u:.1f},{v:.1f}' "
                     f"fill='none' stroke='currentColor' opacity='{0.2 + 0.6 * chance[node]:.2f}'/>")
    x, y = place(-1)
    parts.append(f"<rect x='{x - 6}' y='{y - 6:.1f}' width='12' height='12'><title>the context</title></rect>")
    for node in range(shape.n_nodes):
        x, y = place(node)
        radius = 1.5 + 8 * math.sqrt(chance[node])
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:.1f}' fill='{COLOURS[0]}' fill-opacity"
                     f"='{0.35 + 0.65 * chance[node]:.2f}' stroke='currentColor' stroke-width='.8'>"
                     f"<title>draft {shape.ranks[node] + 1} of its parent, level {shape.depths[node]}: accepted with "
                     f"probability {chance[node]:.3f}</title></circle>")
    return Pane(f"picture-{name}", "svg", {"svg": "".join([*parts, "</svg>"]), **told})


def _lines(along: Mapping[str, Sequence[tuple[int, float, float]]], column: int, budget: int,
           best: tuple[int, float, float] | None, label: str) -> Pane:
    """A line per kind of tree over the budget, on a logarithmic scale; the budget now, and the fastest tree."""
    lines: list[dict[str, Any]] = [{"label": name, "x": [row[0] for row in rows], "y": [row[column] for row in rows]}
                                   for name, rows in along.items()]
    highest = max(max(entry["y"]) for entry in lines)
    lines.append({"label": f"budget {budget}", "x": [budget, budget], "y": [0.0, highest], "faint": True})
    marks = [{"x": best[0], "y": best[column], "shape": "star", "text": f"the fastest: {best[column]:.3g} at {best[0]}",
              "attributes": {"data-testid": "star"}}] if best is not None and best[0] else []
    said = f"{label} by budget: " + "; ".join(f"{name} {rows[-1][column]:.3g} at {rows[-1][0]}"
                                              for name, rows in along.items())
    return curve(f"curve-{column}", lines, x="budget of nodes", y=label, better="up", log_x=True, marks=marks,
                 said=said)
