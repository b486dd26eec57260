"""The panel on acceptance at one position: every rule beside the optimum over all rules, and the set that binds."""

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
from workbench.problems.decoding import Decoding
from workbench.speculation.acceptance import Optimum, draft_law, optimal, remainder
from workbench.speculation.drafting import warp
from workbench.speculation.rules import RULES

SIZES = tuple(sorted({3, *(2**k for k in range(2, 18)), *(3 * 2**k for k in range(1, 16))}))
ENUMERATED = 5  # tokens up to which recursive rejection without replacement is enumerated
CELLS = 24  # of a side of the simplex, to place names
CORNERS = ((30.0, 286.0), (330.0, 286.0), (180.0, 26.0))  # of tokens A, B and C
RULE_NAMES = {"single": "single draft", "rrs": "recursive rejection", "k_seq": "k-SEQ (SpecTr)",
              "rrs_without": "recursive, no repeats", "greedy": "greedy", "top": "one-hot (EAGLE-2)"}
REACH = {"rrs": "iid", "k_seq": "iid", "rrs_without": "without"}  # of rules: the drafts whose optimum bounds them
BOUND_NAMES = {"iid": "optimum, i.i.d. drafts", "without": "optimum, no repeats"}
Bounds = Mapping[str, Optimum | None]


def acceptance_explorer(problem: Decoding | None = None, *, draft: str = "best", vocab_size: int = 3,
                        n_drafts: int = 2, temperature: float = 1.0, divergence: float = 0.7, seed: int = 0,
                        sharpness: float = 2.0) -> LivePanel:
    """How often drafts of one position can be accepted, live: every rule beside the optimum over all rules.

    Without a problem the target's logits are sharpness x standard normal and the draft's those plus divergence x
    standard normal, for 3 to 131,072 tokens. With one, its `positions` are shown, one at a time; draft names one of
    its drafts. With three tokens the simplex of all draft laws is drawn, and both laws can be dragged. numbers: {name:
    acceptance}, "subset" and "seconds" per part. Raises ValueError naming an argument out of range.
    """
    for name, value in (("divergence", divergence), ("sharpness", sharpness)):
        if not 0 <= value <= 8:
            raise ValueError(f"{name}={value!r}: expected 0 to 8")
    common = [
        Slider("n_drafts", "drafts", tuple(range(1, 9)), n_drafts, "drafts side by side at the position"),
        Slider("temperature", "temperature", steps(0, 2, 0.05), temperature, "divides the logits of both models"),
    ]
    if problem is not None:
        target_logits, draft_logits = problem.positions(problem.draft(draft).name)
        places = tuple(range(len(target_logits)))
        sliders = [*common, Slider("position", "position", places, 0, "which of the problem's positions")]
        where = problem.name

        def made(values: Values) -> tuple[np.ndarray, np.ndarray]:
            k = int(values["position"])
            return (warp(target_logits[k], values["temperature"]), warp(draft_logits[k], values["temperature"]))

        def laws_code(values: Values) -> list[str]:  # the problem's own lines may hold braces: they are no template
            return [*problem.source.splitlines(), f"target, draft = (warp(x[{values['position']}], "
                    f"{values['temperature']}) for x in problem.positions(problem.draft({draft!r}).name))"]
    else:
        sliders = [
            Slider("vocab_size", "vocabulary", SIZES, vocab_size, "tokens, on a logarithmic scale"), *common,
            Slider("divergence", "divergence", steps(0, 4, 0.1), divergence,
                   "deviation of the draft's logits from the target's"),
            Slider("seed", "seed", tuple(range(100)), seed, "of the random logits"),
        ]
        where = "random laws"

        @lru_cache(maxsize=1)
        def noise(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
            stream = np.random.default_rng(seed)
            return stream.standard_normal(size), stream.standard_normal(size)

        @lru_cache(maxsize=1)
        def warped(seed: int, size: int, apart: float, heat: float) -> tuple[np.ndarray, np.ndarray]:
            own, error = noise(seed, size)
            return warp(sharpness * own, heat), warp(sharpness * own + apart * error, heat)

        def made(values: Values) -> tuple[np.ndarray, np.ndarray]:
            return warped(int(values["seed"]), int(values["vocab_size"]), values["divergence"], values["temperature"])

        def laws_code(values: Values) -> list[str]:
            return [f"stream = np.random.default_rng({values['seed']})",
                    f"logits = {sharpness} * stream.standard_normal({values['vocab_size']})",
                    f"other = logits + {values['divergence']} * stream.standard_normal(len(logits))",
                    f"target, draft = warp(logits, {values['temperature']}), warp(other, {values['temperature']})"]

    def draw(values: Values, is_late: Stop) -> Iterator[Drawing]:
        begin = time.perf_counter()
        target, given = made(values)
        target, given = (target if values.get("target") is None else np.array(values["target"]),
                         given if values.get("draft") is None else np.array(values["draft"]))
        dragged = values.get("target") is not None or values.get("draft") is not None
        laws = [f"target, draft = np.array({target.tolist()}), np.array({given.tolist()})"] if dragged else (
            laws_code(values))
        code = "\n".join(["import numpy as np", "from workbench.speculation.acceptance import optimal",
                          "from workbench.speculation.drafting import warp",
                          "from workbench.speculation.rules import RULES", *laws,
                          f"n = {values['n_drafts']}",
                          "print({d: optimal(target, draft, n, d).acceptance for d in ('iid', 'without')})",
                          "print({r: RULES[r].acceptance(target, draft, n) for r in ('rrs', 'k_seq', 'greedy', "
                          "'top')})"])
        yield from _acceptance(where, target, given, int(values["n_drafts"]), values, code,
                               time.perf_counter() - begin, is_late)

    def move(values: Values, point: str, x: float, y: float) -> Values:
        if point not in ("target", "draft") or values.get("vocab_size") != 3:
            return values
        law = _law_at(x, y)
        if law is None:  # a key or a hand far outside
            return values
        return {**values, point: tuple(law.tolist())}

    def changed(values: Values, knob: str) -> Values:
        return values if knob == "n_drafts" else {**values, "target": None, "draft": None}

    return LivePanel("acceptance", sliders, draw, move, changed)


def _acceptance(where: str, target: np.ndarray, draft: np.ndarray, n: int, values: Values, code: str, made: float,
                is_late: Stop) -> Iterator[Drawing]:
    seconds, found = {"laws": made}, {}
    bounds: dict[str, Optimum | None] = {"iid": None, "without": None}

    def timed(part: str, compute: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        out = compute()
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin
        return out

    bounds["iid"] = timed("optimum, i.i.d.", lambda: optimal(target, draft, n))
    for name in ("single", "rrs", "k_seq", "greedy", "top"):
        found[name] = timed("rules", lambda name=name: RULES[name].acceptance(target, draft, 1 if name == "single"
                                                                             else n))
    if len(target) <= ENUMERATED:
        found["rrs_without"] = timed("rules", lambda: enumerated_without(target, draft, n))

    def drawn() -> Drawing:
        begin = time.perf_counter()
        size = len(target)
        title = f"{several(n, 'draft')} · {size:,} tokens · temperature {values['temperature']:g} · {where}"
        picture = simplex if size == 3 else prefix_curve
        panes = [bars(found, bounds), picture(target, draft, n, bounds)]
        seconds["drawing"] = time.perf_counter() - begin
        times = "; ".join(f"{part} {in_ms(spent)}" for part, spent in seconds.items())
        numbers = {**found, **{f"optimum_{k}": b.acceptance for k, b in bounds.items() if b is not None},
                   "subset": bounds["iid"].order[: bounds["iid"].subset_size],
                   "seconds": dict(seconds), "target_probs": target, "draft_probs": draft}
        waits = "" if bounds["without"] is not None else "; optimum without repeats is on its way"
        key = f"{n}-{size}-{hash((target.tobytes(), draft.tobytes()))}-{bounds['without'] is None}"
        return Drawing(title, panes, times + waits, key, code, numbers)

    if n > 2 and len(target) > 2048:  # what takes long comes second
        yield drawn()
        if is_late():
            return
    bounds["without"] = timed("optimum, no repeats", lambda: optimal(target, draft, n, "without"))
    yield drawn()


def enumerated_without(target: np.ndarray, draft: np.ndarray, n: int) -> float:
    """Acceptance of recursive rejection without replacement, over all ordered drafts: for a few tokens only."""
    rejected = 0.0
    for tokens, mass in draft_law(draft, n, "without").items():
        wanted, given = target, draft
        for x in tokens:
            mass *= 1.0 - min(1.0, wanted[x] / given[x])
            left = np.maximum(wanted - given, 0.0)
            if mass == 0 or left.sum() == 0:
                mass = 0.0
                break
            wanted, given = left / left.sum(), remainder(given, (x,))
        rejected += mass
    return float(1.0 - rejected)


def bars(found: Mapping[str, float], bounds: Bounds) -> Pane:
    """A bar per rule, hatched up to the optimum of the drafts that it takes, and the optima."""
    items: list[dict[str, Any]] = []
    for name in (name for name in RULE_NAMES if name in found):
        value, bound = found[name], bounds.get(REACH.get(name, ""))
        missing = 0.0 if bound is None else bound.acceptance - value
        items.append({"label": RULE_NAMES[name], "value": value, "text": f"{value:.4f}", "colour": 0})
        if missing > 5e-5:
            items[-1] |= {"reach": value + missing, "text": f"{value:.4f} (−{missing:.4f})"}
    items += [{"label": BOUND_NAMES[name], "value": bound.acceptance, "text": f"{bound.acceptance:.4f}", "colour": 1}
              for name, bound in bounds.items() if bound is not None]
    return Pane("bars", "bars", {
        "items": items, "full": 1, "caption": "P(output is a draft). Hatched, and in brackets: what is missing to the "
        "optimum of the same drafts. Greedy and one-hot drafts are verified at their own optimum."})


def simplex_values(target: np.ndarray, drafts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Over draft laws (m, 3), i.i.d.: the optimum (m,) and which of the 8 token sets binds (m,), as bits."""
    inside = (np.arange(8)[:, None] >> np.arange(3)) & 1
    gaps = inside @ target - (drafts @ inside.T) ** n
    gaps[:, (0, 7)] = 0.0  # the empty set and all tokens, without rounding
    binding = gaps.argmin(axis=1)
    lowest = gaps[np.arange(len(drafts)), binding]
    return 1.0 + lowest, np.where(lowest > -1e-12, 0, binding)


def _xy(law: np.ndarray) -> np.ndarray:
    return law @ np.array(CORNERS)


def _law_at(x: float, y: float) -> np.ndarray | None:
    """The law at a place of the picture, moved into the simplex; None for what is no place."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return None
    corners = np.array(CORNERS)
    weights = np.linalg.solve(np.vstack([corners.T, np.ones(3)]), [x, y, 1.0])
    weights = np.maximum(weights, 0.002)
    return weights / weights.sum()


def level_set(target: np.ndarray, n: int, lost: float) -> list[tuple[np.ndarray, int, int]]:
    """The corners of the draft laws whose optimum with n i.i.d. drafts is at least 1 - lost, each (law (3,), set, set).

    1 + target(H) - draft(H)^n >= 1 - lost is draft(H) <= (target(H) + lost)^(1/n): a half plane for each set H of
    tokens. Sets, as bits, are those on whose bounds a corner lies; 0 is the simplex's own edge.
    """
    corners = [(np.eye(3)[i], 0) for i in range(3)]  # and the set that bounds the edge that leaves the corner
    for mask in range(1, 7):
        inside = (mask >> np.arange(3)) & 1
        limit = min(1.0, float(inside @ target) + lost) ** (1 / n)
        kept: list[tuple[np.ndarray, int]] = []
        for k, (law, edge) in enumerate(corners):
            after = corners[(k + 1) % len(corners)][0]
            here, there = limit - inside @ law, limit - inside @ after
            if here >= 0:
                kept.append((law, edge))
            if (here >= 0) != (there >= 0):
                kept.append((law + (after - law) * here / (here - there), mask if here >= 0 else edge))
        corners = kept
    return [(law, corners[k - 1][1], edge) for k, (law, edge) in enumerate(corners)]


def simplex(target: np.ndarray, draft: np.ndarray, n: int, bounds: Bounds) -> Pane:
    """The triangle of draft laws, a shade per tenth of acceptance lost, cut where another token set binds."""
    letters, triangle = "ABC", "M" + "L".join(f"{x:g},{y:g}" for x, y in CORNERS) + "Z"
    parts = []
    for tenth in range(9):
        inner = [_xy(law) for law, _, _ in level_set(target, n, tenth / 10)]
        hole = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in inner) + "Z"
        parts.append(f"<path d='{triangle}{hole}' fill='{COLOURS[0]}' fill-opacity='.13' fill-rule='evenodd'/>")
    seams: dict[frozenset[int], list[np.ndarray]] = {}
    for step in range(25):  # where two sets bind at once, from no loss on
        for law, *sets in level_set(target, n, step / 24):
            if 0 not in sets:
                seams.setdefault(frozenset(sets), []).append(_xy(law))
    lines = "".join("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in seam) for seam in seams.values())
    innermost = "L".join(f"{x:.1f},{y:.1f}" for x, y in (_xy(law) for law, _, _ in level_set(target, n, 0.0)))
    parts.append(f"<path d='{triangle}{lines}M{innermost}Z' fill='none' stroke='currentColor' stroke-width='1.2'/>")
    grid = np.array([(i, j, CELLS - i - j) for i in range(CELLS + 1) for j in range(CELLS + 1 - i)]) / CELLS
    binding = simplex_values(target, grid, n)[1]
    points = [_xy(target), _xy(draft)]
    for mask in range(7):
        if (binding == mask).sum() >= 6:
            own = _xy(grid[binding == mask])
            taken = np.any([(np.abs(own[:, 1] - y) < 17) & (own[:, 0] > x - 28) & (own[:, 0] < x + 66)
                            for x, y in points], axis=0)
            x, y = own[(np.abs(own - own.mean(axis=0)).sum(axis=1) + 1e3 * taken).argmin()]
            name = "".join(letter for i, letter in enumerate(letters) if mask >> i & 1)
            parts.append(f"<text x='{x:.0f}' y='{y + 5:.0f}' text-anchor='middle' font-size='14' font-weight='600' "
                         f"class='wba-name'>{name or 'none'}</text>")
    for (x, y), letter, (dx, dy, anchor) in zip(CORNERS, letters, ((-4, 18, "end"), (4, 18, "start"),
                                                                  (0, -8, "middle")), strict=True):
        parts.append(f"<text x='{x + dx}' y='{y + dy}' text-anchor='{anchor}'>all {letter}</text>")
    for name, law, colour in (("target", target, COLOURS[1]), ("draft", draft, COLOURS[5])):
        x, y = _xy(law)
        said = f"{name} law: " + ", ".join(f"{letter} {v:.3f}" for letter, v in zip(letters, law, strict=True))
        shape = (f"<path d='M{x:.1f},{y - 10:.1f}l9,10l-9,10l-9,-10Z' fill='{colour}' stroke='currentColor' "
                 "stroke-width='1.5'/>" if name == "target" else f"<circle cx='{x:.1f}' cy='{y:.1f}' r='8.5' "
                 f"fill='{colour}' stroke='currentColor' stroke-width='1.5'/>")
        parts.append(f"<g data-drag='{name}' data-x='{x:.2f}' data-y='{y:.2f}' tabindex='0' role='button' "
                     f"aria-label='{said}; arrow keys move it'><title>{said}</title>{shape}"
                     f"<text x='{x + 13:.1f}' y='{y + 5:.1f}' class='wba-name' font-weight='600'>{name}</text></g>")
    bound = bounds["iid"]
    assert bound is not None
    tokens = sorted(bound.order[: bound.subset_size].tolist())
    size = 0 if bound.acceptance > 1 - 1e-12 else bound.subset_size
    said = (f"Optimal acceptance of {n} i.i.d. drafts over all draft laws; the draft's is {bound.acceptance:.3f}; "
            + (f"the set {', '.join(letters[i] for i in tokens)} binds" if size else "no set binds"))
    laws = " and ".join(f"{name} ({', '.join(f'{v:.3f}' for v in p)})"
                        for name, p in (("target", target), ("draft", draft)))
    strong, rest = _binds(target, draft, n, tokens if size else [], letters)
    return Pane("simplex-picture", "svg", {
        "svg": f"<svg role='group' data-testid='simplex' aria-label='{said}' viewBox='0 0 360 312' class='wba-picture' "
               f"font-size='12' fill='currentColor'>{''.join(parts)}</svg>", "strong": strong,
        "caption": f"{rest} Each place is a draft law, a shade bluer per tenth of acceptance lost with {n} i.i.d. "
                   f"drafts; the names are the sets H that bind, lines part them. Now {laws}."})


def _binds(target: np.ndarray, draft: np.ndarray, n: int, tokens: Sequence[int] | np.ndarray,
           names: Sequence[str] | None = None, shown: int = 6) -> tuple[str, str]:
    """What is said on the set that binds: in bold, and after it."""
    if not len(tokens):
        return "No set binds", ": acceptance 1 is possible."
    listed = ", ".join(names[i] if names else str(i) for i in tokens[:shown])
    more = f", … ({len(tokens):,} tokens)" if len(tokens) > shown else ""
    inside, mass = float(draft[np.asarray(tokens)].sum()) ** n, float(target[np.asarray(tokens)].sum())
    return f"{{{listed}{more}}} binds", (
        f": all {n} drafts lie in it with probability {inside:.4f}, but only {mass:.4f} of the target does, so "
        f"{max(inside - mass, 0.0):.4f} is lost.")


def prefix_curve(target: np.ndarray, draft: np.ndarray, n: int, bounds: Bounds) -> Pane:
    """1 + P_i - C_i^n over the prefixes of the tokens by draft/target, with the minimum that binds."""
    best = bounds["iid"]
    assert best is not None
    mass = np.concatenate([[0.0], np.cumsum(draft[best.order])])
    wanted = np.concatenate([[0.0], np.cumsum(target[best.order])])
    sizes = np.unique(np.searchsorted(mass, np.linspace(0, mass[-1], 240)).clip(0, len(draft)))
    sizes = np.unique([*sizes, best.subset_size, 0, len(draft)])
    lines = [{"label": several(k, "draft"), "x": mass[sizes].tolist(), "colour": 0, "bare": k == n, "faint": k != n,
              "y": (1 + wanted[sizes] - mass[sizes] ** k).tolist()} for k in dict.fromkeys((1, n))]
    at = float(mass[best.subset_size])
    other = bounds["without"]
    without = "" if other is None else (f" Without repeats the first {other.subset_size:,} bind."
                                        if other.acceptance < 1 - 1e-12 else " Without repeats no set binds.")
    strong, rest = _binds(target, draft, n, best.order[: 0 if best.acceptance > 1 - 1e-12 else best.subset_size])
    return curve(
        "curve", lines, x="draft mass of the prefix H (tokens by draft / target, largest first)",
        y=f"1 + target(H) − draft(H)^{n}", strong=strong,
        caption=f"{rest}{without} The curve's least value is the optimal acceptance.",
        marks=[{"x": at, "y": best.acceptance, "note": f"{best.acceptance:.4f}", "colour": 1,
                "text": f"optimal acceptance {best.acceptance:.4f} at draft mass {at:.4f}"}],
        said=f"1 + target(H) - draft(H)^{n} over prefixes H; least {best.acceptance:.4f} at the first "
             f"{best.subset_size:,} of {len(draft):,} tokens")
