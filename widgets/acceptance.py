"""Panels on how many drafts are worth it: acceptance at one position against its optimum, and the tree of a budget.

`LivePanel` is the controller of both and knows no toolkit: it keeps the sliders' values, and a worker thread draws the
newest ones first. `js/acceptance.js` shows what it publishes. Pictures are SVG, so they follow the page's colours.
"""

from __future__ import annotations

import html
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from widgets.frontier import COLOURS
from widgets.live import Guard, Outbox, told
from workbench.problems.decoding import Decoding, rank_acceptance
from workbench.speculation.acceptance import Optimum, draft_law, optimal, remainder
from workbench.speculation.drafting import warp
from workbench.speculation.engine import Warp
from workbench.speculation.rules import RULES
from workbench.speculation.speed import CostCurve, Speedup, predict_speed
from workbench.speculation.trees import Shape, best_tree, chain, expected_tokens, sequoia
from workbench.speculation.trees import widths as tree_of_widths

HERE = Path(__file__).parent
MAX_VOCABULARY = 131_072
SIZES = tuple(sorted({3, *(2**k for k in range(2, 18)), *(3 * 2**k for k in range(1, 16))}))
RANKS, MAX_NODES, MAX_DEPTH = 8, 64, 16
ENUMERATED = 5  # tokens up to which recursive rejection without replacement is enumerated
CELLS = 24  # of a side of the simplex, to place names
CORNERS = ((30.0, 286.0), (330.0, 286.0), (180.0, 26.0))  # of tokens A, B and C
RULE_NAMES = {"single": "single draft", "rrs": "recursive rejection", "k_seq": "k-SEQ (SpecTr)",
              "rrs_without": "recursive, no repeats", "greedy": "greedy", "top": "one-hot (EAGLE-2)"}
BOUND_NAMES = {"iid": "optimum, i.i.d. drafts", "without": "optimum, no repeats"}

Stop = Callable[[], bool]
Values = dict[str, Any]


@dataclass(frozen=True)
class Slider:
    """A knob of a panel: it takes one of `values`, ascending. unit stands behind the value shown."""

    name: str
    label: str
    values: tuple[float, ...]
    start: float
    help: str
    unit: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not isinstance(self.start, int | float) or not (
                self.values[0] <= self.start <= self.values[-1]):
            raise ValueError(f"{self.name}={self.start!r}: expected {self.values[0]:g} to {self.values[-1]:g}")
        if all(isinstance(v, int) for v in self.values) and self.start != int(self.start):
            raise ValueError(f"{self.name}={self.start!r}: expected a whole number")
        object.__setattr__(self, "values", tuple(sorted({*self.values, self.start})))

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "label": self.label, "values": list(self.values), "help": self.help,
                "texts": [f"{v:,}{self.unit}" if isinstance(v, int) else f"{v:g}{self.unit}" for v in self.values]}


@dataclass(frozen=True)
class Drawing:
    """What a panel shows of its values. key changes with the picture; numbers are what is drawn, for the notebook."""

    title: str
    body: str
    status: str
    key: str
    code: str
    numbers: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True


class LivePanel:
    """A panel of sliders and a picture that follows them. Use `acceptance_explorer` or `tree_explorer`; as a cell's
    last line it shows itself.

    values: of the sliders now; numbers: what is drawn, once `wait()` has returned; error: what the last drawing raised,
    shown in the panel too. With WORKBENCH_HEADLESS set in the environment, changes are drawn at once and raise.
    """

    def __init__(self, name: str, sliders: Sequence[Slider], draw: Callable[[Values, Stop], Iterator[Drawing]],
                 move: Callable[[Values, str, float, float], Values] | None = None,
                 changed: Callable[[Values, str], Values] = lambda values, knob: values) -> None:
        self.sliders = {s.name: s for s in sliders}
        self.values: Values = {s.name: s.start for s in sliders}
        self.numbers: dict[str, Any] = {}
        self.error: BaseException | None = None
        self._name, self._draw, self._move, self._changed = name, draw, move, changed
        self._outbox = Outbox({
            "spec": {"name": name, "sliders": [s.spec() for s in sliders]},
            "view": {"values": dict(self.values), "title": name, "body": "", "status": "", "key": "", "code": "",
                     "error": ""}})
        self._lock, self._drawn = Guard(self._outbox), 0
        self._revision, self._is_working = 1, False
        self.is_headless = bool(os.environ.get("WORKBENCH_HEADLESS"))
        self._wake()

    def set(self, **values: float) -> None:
        """Move sliders. Raises ValueError for a name that is none, or a value that the slider does not reach."""
        sliders, moved = dict(self.sliders), self.values
        for name, value in values.items():  # what is refused or raises leaves all as it was
            if name not in sliders:
                raise ValueError(f"{name}: no slider of this panel; it has {', '.join(sliders)}")
            sliders[name] = replace(sliders[name], start=value)
            moved = self._changed({**moved, name: value}, name)
        self.sliders = sliders
        self._outbox.put("spec", {"name": self._name, "sliders": [s.spec() for s in sliders.values()]})
        self._outbox.send()
        self._take(moved)
        self._wake()

    def receive(self, wish: Mapping[str, Any]) -> None:
        """What the front end asks for: {"knob", "index"} of a slider, or {"point", "x", "y"} of a point dragged.

        What cannot be is said in the panel, never raised; the values stay.
        """
        try:
            if "knob" in wish:
                slider = self.sliders[wish["knob"]]
                index = int(wish["index"])
                if not 0 <= index < len(slider.values):
                    raise ValueError(f"{slider.name}: place {index}, expected 0 to {len(slider.values) - 1}")
                self._take(self._changed({**self.values, slider.name: slider.values[index]}, slider.name))
            elif self._move is not None:
                self._take(self._move(self.values, wish["point"], float(wish["x"]), float(wish["y"])))
        except Exception as error:
            with self._lock:
                self._outbox.put("view", {**self.published["view"], "error": told(error)})
            return
        self._wake()

    def wait(self, timeout: float = 60) -> None:
        """Until the newest values are drawn. Raises what drawing them raised, or TimeoutError after timeout seconds."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._drawn == self._revision, timeout):
                raise TimeoutError(f"not drawn within {timeout} s")
            if self.error is not None:
                raise self.error

    def subscribe(self, listener: Callable[[str, Any], None]) -> None:
        """listener(name, value) of what is published, from now on and once at first."""
        self._outbox.subscribe(listener)
        self._outbox.send()

    @property
    def published(self) -> dict[str, Any]:
        return self._outbox.published

    def _take(self, values: Values) -> None:
        with self._lock:
            self.values = values
            self._revision += 1

    def _wake(self) -> None:
        if self.is_headless:
            self._work()
            if self.error is not None:
                raise self.error
            return
        with self._lock:
            if self._is_working:
                return
            self._is_working = True
        threading.Thread(target=self._work, name="panel", daemon=True).start()

    def _work(self) -> None:
        """Draw the newest values until there are none newer; what is overtaken is given up between its drawings."""
        while True:
            with self._lock:
                if self._drawn == self._revision:
                    self._is_working = False
                    return
                revision, values = self._revision, dict(self.values)

            def is_late(revision: int = revision) -> bool:
                return self._revision != revision

            shown, error = None, None
            try:
                for shown in self._draw(values, is_late):
                    self._publish(values, shown, None)
                    if is_late():
                        break
            except Exception as raised:  # whatever a user's laws or cost curve raise; it is shown, and kept
                error = raised
                self._publish(values, shown, raised)
            with self._lock:
                if revision == self._revision:
                    self.error, self._drawn = error, revision
                    self._lock.notify_all()

    def _publish(self, values: Values, drawing: Drawing | None, error: BaseException | None) -> None:
        view = {**self.published["view"], "values": values,
                "error": "" if error is None else f"{type(error).__name__}: {error}"}
        if drawing is not None:
            self.numbers = drawing.numbers
            view |= {"title": drawing.title, "body": drawing.body, "status": drawing.status, "key": drawing.key,
                     "code": drawing.code}
        with self._lock:
            self._outbox.put("view", view)

    @cached_property
    def widget(self) -> LiveWidget:
        return LiveWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if self.is_headless:
            return {"text/plain": f"{self.published['view']['title']}\n{self.published['view']['status']}"}
        return self.widget._repr_mimebundle_(**kwargs)


class LiveWidget(anywidget.AnyWidget):
    """A LivePanel in JupyterLab. Wishes come as messages, results go as traits: each is set by one side only."""

    _esm = HERE / "js" / "acceptance.js"
    _css = (HERE / "explorer.css").read_text()
    spec = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, panel: LivePanel) -> None:
        super().__init__()
        self.on_msg(lambda widget, wish, buffers: panel.receive(wish))
        panel.subscribe(lambda name, value: setattr(self, name, value))


# ---------------------------------------------------------------------------------------------- acceptance


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
        Slider("temperature", "temperature", _steps(0, 2, 0.05), temperature, "divides the logits of both models"),
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
            Slider("divergence", "divergence", _steps(0, 4, 0.1), divergence,
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
        title = f"{_several(n, 'draft')} · {size:,} tokens · temperature {values['temperature']:g} · {where}"
        picture = (simplex(target, draft, n, bounds) if size == 3 else prefix_curve(target, draft, n, bounds))
        body = f"<div class='wba-two'>{bars(found, bounds)}{picture}</div>"
        seconds["drawing"] = time.perf_counter() - begin
        times = "; ".join(f"{part} {_ms(spent)}" for part, spent in seconds.items())
        numbers = {**found, **{f"optimum_{k}": b.acceptance for k, b in bounds.items() if b is not None},
                   "subset": bounds["iid"].order[: bounds["iid"].subset_size],
                   "seconds": dict(seconds), "target_probs": target, "draft_probs": draft}
        waits = "" if bounds["without"] is not None else "; optimum without repeats is on its way"
        key = f"{n}-{size}-{hash((target.tobytes(), draft.tobytes()))}-{bounds['without'] is None}"
        return Drawing(title, body, times + waits, key, code, numbers, bounds["without"] is not None)

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


def bars(found: Mapping[str, float], bounds: Mapping[str, Optimum | None]) -> str:
    """SVG: a bar per rule, hatched up to the optimum of the drafts that it takes, and the optima."""
    reach = {"rrs": "iid", "k_seq": "iid", "rrs_without": "without"}
    rows: list[tuple[str, float, float | None, str]] = []
    for name in RULE_NAMES:
        if name in found:
            bound = bounds.get(reach.get(name, ""))
            rows.append((RULE_NAMES[name], found[name], None if bound is None else bound.acceptance, COLOURS[4]))
    for name, bound in bounds.items():
        if bound is not None:
            rows.append((BOUND_NAMES[name], bound.acceptance, None, COLOURS[1]))
    left, width, step = 142, 190, 27
    height = step * len(rows) + 30
    said = "; ".join(f"{label} {value:.3f}" for label, value, _, _ in rows)
    parts = [f"<svg role='img' data-testid='bars' aria-label='acceptance: {html.escape(said, True)}' "
             f"viewBox='0 0 430 {height}' class='wba-picture' font-size='12' fill='currentColor'>",
             "<defs><pattern id='wba-hatch' width='6' height='6' patternTransform='rotate(45)' "
             "patternUnits='userSpaceOnUse'><path d='M0,0V6' stroke='currentColor' stroke-width='1.6' opacity='.55'/>"
             "</pattern></defs>"]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + width * share
        parts.append(f"<path d='M{x},0V{height - 26}' stroke='currentColor' opacity='.18'/>"
                     f"<text x='{x}' y='{height - 10}' text-anchor='middle'>{share:g}</text>")
    for i, (label, value, bound, colour) in enumerate(rows):
        y = step * i + 4
        parts.append(f"<text x='{left - 6}' y='{y + 14}' text-anchor='end'>{html.escape(label)}</text>"
                     f"<rect x='{left}' y='{y}' width='{width * value:.1f}' height='19' fill='{colour}'/>")
        after = f"{value:.4f}"
        if bound is not None and bound - value > 5e-5:
            parts.append(f"<rect x='{left + width * value:.1f}' y='{y}' width='{width * (bound - value):.1f}' "
                         "height='19' fill='url(#wba-hatch)'/>")
            after += f" (−{bound - value:.4f})"
        parts.append(f"<text x='{left + width + 6}' y='{y + 14}'>{after}</text>")
    return ("<figure>" + "".join([*parts, "</svg>"])
            + "<figcaption>P(output is a draft). Hatched, and in brackets: what is missing to the optimum of the same "
              "drafts. Greedy and one-hot drafts are verified at their own optimum.</figcaption></figure>")


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


def simplex(target: np.ndarray, draft: np.ndarray, n: int, bounds: Mapping[str, Optimum | None]) -> str:
    """SVG: the triangle of draft laws, a shade per tenth of acceptance lost, cut where another token set binds."""
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
    return (f"<figure><svg role='group' data-testid='simplex' aria-label='{said}' viewBox='0 0 360 312' "
            f"class='wba-picture' font-size='12' fill='currentColor'>{''.join(parts)}</svg><figcaption>"
            f"Each place is a draft law, a shade bluer per tenth of acceptance lost with {n} i.i.d. drafts; the "
            f"names are the sets H that bind, lines part them. Now {laws}. "
            f"{_binds(target, draft, n, tokens if size else [], letters)}</figcaption></figure>")


def _binds(target: np.ndarray, draft: np.ndarray, n: int, tokens: Sequence[int] | np.ndarray,
           names: Sequence[str] | None = None, shown: int = 6) -> str:
    """The sentence on the set that binds."""
    if not len(tokens):
        return "<b>No set binds</b>: acceptance 1 is possible."
    listed = ", ".join(names[i] if names else str(i) for i in tokens[:shown])
    more = f", … ({len(tokens):,} tokens)" if len(tokens) > shown else ""
    inside, mass = float(draft[np.asarray(tokens)].sum()) ** n, float(target[np.asarray(tokens)].sum())
    return (f"<b data-testid='binding'>{{{listed}{more}}} binds</b>: all {n} drafts lie in it with probability "
            f"{inside:.4f}, but only {mass:.4f} of the target does, so {max(inside - mass, 0.0):.4f} is lost.")


def prefix_curve(target: np.ndarray, draft: np.ndarray, n: int, bounds: Mapping[str, Optimum | None]) -> str:
    """SVG: 1 + P_i - C_i^n over the prefixes of the tokens by draft/target, with the minimum that binds."""
    best = bounds["iid"]
    assert best is not None
    mass = np.concatenate([[0.0], np.cumsum(draft[best.order])])
    wanted = np.concatenate([[0.0], np.cumsum(target[best.order])])
    sizes = np.unique(np.searchsorted(mass, np.linspace(0, mass[-1], 240)).clip(0, len(draft)))
    sizes = np.unique([*sizes, best.subset_size, 0, len(draft)])
    left, right, top, low = 44, 412, 14, 250
    curves = {k: 1 + wanted[sizes] - mass[sizes] ** k for k in dict.fromkeys((1, n))}
    floor = math.floor(10 * min(c.min() for c in curves.values()) - 1e-9) / 10
    floor = min(max(floor, 0.0), 0.9)
    ceiling = max(1.02, *(c.max() for c in curves.values()))

    def place(x: float, y: float) -> str:
        return f"{left + (right - left) * x:.1f},{low - (low - top) * (y - floor) / (ceiling - floor):.1f}"

    said = (f"1 + target(H) - draft(H)^{n} over prefixes H; least {best.acceptance:.4f} at the first "
            f"{best.subset_size:,} of {len(draft):,} tokens")
    parts = [f"<svg role='img' data-testid='curve' aria-label='{said}' viewBox='0 0 430 292' class='wba-picture' "
             "font-size='12' fill='currentColor'>",
             f"<clipPath id='wba-clip'><rect x='{left}' y='{top - 4}' width='{right - left}' height='{low - top + 8}'/>"
             "</clipPath>"]
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5) if (ceiling - floor) / s <= 6)
    for k in range(math.ceil(floor / step - 1e-9), math.floor(ceiling / step + 1e-9) + 1):
        y = k * step
        a, b = place(0, y).split(","), place(1, y).split(",")
        parts.append(f"<path d='M{a[0]},{a[1]}H{b[0]}' stroke='currentColor' opacity='.18'/>"
                     f"<text x='{left - 6}' y='{float(a[1]) + 4:.1f}' text-anchor='end'>{y:.3g}</text>")
    for x in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f"<text x='{left + (right - left) * x:.0f}' y='{low + 16}' text-anchor='middle'>{x:g}</text>")
    parts.append(f"<text x='{(left + right) / 2:.0f}' y='{low + 34}' text-anchor='middle'>draft mass of the prefix H "
                 "(tokens by draft / target, largest first)</text>")
    for k, curve in curves.items():
        points = " ".join(place(x, y) for x, y in zip(mass[sizes], curve, strict=True))
        look = (f"stroke='{COLOURS[0]}' stroke-width='2.5'" if k == n
                else "stroke='currentColor' stroke-dasharray='5 4' opacity='.7'")
        parts.append(f"<polyline points='{points}' fill='none' {look} clip-path='url(#wba-clip)'/>")
    if n > 1:
        at = int(np.argmin(curves[1]))
        x, y = map(float, place(mass[sizes][at], curves[1][at]).split(","))
        parts.append(f"<text x='{x:.1f}' y='{min(y + 15, low - 3):.1f}' text-anchor='middle'>one draft</text>")
    at_min = place(mass[best.subset_size], best.acceptance)
    x, y = map(float, at_min.split(","))
    parts.append(f"<path d='M{x},{top}V{y}' stroke='{COLOURS[1]}' stroke-width='1.5'/>"
                 f"<circle cx='{x}' cy='{y}' r='6' fill='{COLOURS[1]}' stroke='currentColor'/>"
                 f"<text x='{x - 10 if x > 220 else x + 10:.1f}' y='{y - 9:.1f}' font-weight='600' text-anchor="
                 f"'{'end' if x > 220 else 'start'}' class='wba-name'>{best.acceptance:.4f}</text>")
    other = bounds["without"]
    without = "" if other is None else (f" Without repeats the first {other.subset_size:,} bind."
                                        if other.acceptance < 1 - 1e-12 else " Without repeats no set binds.")
    size = 0 if best.acceptance > 1 - 1e-12 else best.subset_size
    return ("<figure>" + "".join([*parts, "</svg>"]) + "<figcaption>1 + target(H) − draft(H)<sup>n</sup>: its least "
            f"value is the optimal acceptance. {_binds(target, draft, n, best.order[:size])}{without}</figcaption>"
            "</figure>")


# ---------------------------------------------------------------------------------------------- trees


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
        Slider("temperature", "temperature", _steps(0, 2, 0.05), temperature, "divides the logits of both models"),
    ] if problem is not None else [
        Slider("first", "first draft accepted", _steps(0.05, 0.95, 0.05), first, "acceptance of a node's first draft"),
        Slider("decay", "decay", _steps(0, 1, 0.05), decay,
               "acceptance of a further draft, those before it rejected, over that of its forerunner")]
    sliders += [
        Slider("n_nodes", "budget", tuple(range(1, MAX_NODES + 1)), n_nodes, "drafts per target pass", " nodes"),
        Slider("max_depth", "depth at most", tuple(range(1, MAX_DEPTH + 1)), max_depth,
               "levels, which is draft passes per block", " levels")]
    if draft_seconds is None:
        sliders.append(Slider("draft_cost", "draft pass", _steps(0.005, 0.5, 0.005), draft_cost,
                              "seconds of a draft pass; T(1) is a target pass of one token", " T(1)"))
    if target_seconds is None:
        sliders.append(Slider("token_cost", "a further token", _steps(0, 1, 0.01), token_cost,
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
    shapes = {"Sequoia": sequoia_within(ranks, budget, depth), "fixed widths": tree_of_widths(fixed),
              "chain": chain(min(budget, depth))}
    aware, speed = best_tree(ranks, cost, per_pass, MAX_NODES, MAX_DEPTH)
    plain = cost(1)
    unit, scale = ("tokens/s", 1.0) if is_measured else ("× plain", plain)
    expected = {name: expected_tokens(shape, ranks) for name, shape in shapes.items()}
    predicted = {name: predict_speed(expected[name], shape, cost, per_pass) for name, shape in shapes.items()}
    speeds = {name: found.tokens_per_second * scale for name, found in predicted.items()}
    ladder = sorted({*(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)), budget, aware.n_nodes or 1})
    along: dict[str, list[tuple[int, float, float]]] = {"Sequoia": [], "fixed widths": [], "chain": []}
    for n in ladder:
        for name, shape in (("Sequoia", sequoia_within(ranks, n, depth)),
                            ("fixed widths", tree_of_widths(best_widths(ranks, n, depth))),
                            ("chain", chain(min(n, depth)))):
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
    said = (f"★ the fastest tree for these costs: {_several(aware.n_nodes, 'node')} on {_several(aware.depth, 'level')}"
            if aware.n_nodes else "★ no tree pays at these costs: draft nothing")
    if aware.n_nodes and fastest.interval[0] <= 1:
        said += (f"; {fastest.interval[0]:.2f} to {fastest.interval[1]:.2f} times plain decoding, so what was measured "
                 "does not tell whether it pays")
    wide, low, straight = (tree_picture(shapes[k], ranks, k, *size) for k, size in (
        ("Sequoia", (600, 250)), ("fixed widths", (290, 130)), ("chain", (290, 130))))
    body = (f"<div><figure>{wide}<figcaption>Sequoia's tree; a node's size is the chance that it is accepted with all "
            f"above it</figcaption></figure><div class='wba-two'><figure>{low}<figcaption>the best fixed widths within "
            f"the budget</figcaption></figure><figure>{straight}<figcaption>a chain within the budget and depth"
            f"</figcaption></figure></div>"
            f"<div class='wba-two'>{_lines(along, 1, budget, None, 'tokens per target pass')}"
            f"{_lines(along, 2, budget, best, f'predicted speed, {unit}')}</div>"
            f"<p class='wba-said' data-testid='fastest'>{said}</p>{_rows(heads, rows)}</div>")
    listed = ", ".join(f"{a:.3f}" for a in ranks[:4])
    status = (f"accepted by rank: {listed}, …; {'measured in ' + _ms(got) if where else 'given'}; trees {_ms(spent)}; "
              f"drawing {_ms(time.perf_counter() - begin)}")
    title = (f"{_several(shapes['Sequoia'].n_nodes, 'node')} · {_several(shapes['Sequoia'].depth, 'level')} · "
             f"{expected['Sequoia']:.2f} tokens per target pass" + (f" · {where}" if where else ""))
    code = ("from workbench.speculation.trees import expected_tokens, sequoia\n"
            f"ranks = {tuple(round(a, 6) for a in ranks)}\n"
            f"shape = sequoia(ranks, {shapes['Sequoia'].n_nodes}, {depth})\n"
            "print(shape.parents, expected_tokens(shape, ranks))")
    numbers = {"ranks": ranks, "trees": shapes, "expected": expected, "speed": speeds, "best": (aware, best[2]),
               "widths": fixed}
    key = f"{hash((ranks, budget, depth, per_pass, cost(2), cost(MAX_NODES)))}"
    return Drawing(title, body, status, key, code, numbers)


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


def tree_picture(shape: Shape, ranks: Sequence[float], name: str, width: int, height: int) -> str:
    """SVG: the context at the left, a level of drafts per column, first children above."""
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
    return "".join([*parts, "</svg>"])


def _lines(along: Mapping[str, Sequence[tuple[int, float, float]]], column: int, budget: int,
           best: tuple[int, float, float] | None, label: str) -> str:
    """SVG: a line per kind of tree over the budget, on a logarithmic scale; the budget now, and the fastest tree."""
    left, right, top, low = 34, 284, 12, 150
    highest = max(row[column] for rows in along.values() for row in rows)
    highest = max(highest, best[column] if best else 0.0)
    looks = {"Sequoia": (COLOURS[0], ""), "fixed widths": (COLOURS[1], "6 3"), "chain": (COLOURS[2], "2 3")}

    def place(n: float, value: float) -> tuple[float, float]:
        return left + (right - left) * math.log2(max(n, 1)) / 6, low - (low - top) * value / (1.05 * highest)

    said = f"{label} by budget: " + "; ".join(f"{name} {rows[-1][column]:.3g} at {rows[-1][0]}"
                                              for name, rows in along.items())
    parts = [f"<svg role='img' aria-label='{html.escape(said, True)}' viewBox='0 0 380 188' class='wba-picture' "
             "font-size='11' fill='currentColor'>",
             f"<path d='M{left},{top}V{low}H{right}' fill='none' stroke='currentColor' opacity='.5'/>"]
    step = next(s for e in range(-3, 9) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if highest / s <= 5)
    parts += [f"<text x='{left - 5}' y='{place(1, k * step)[1] + 4:.1f}' text-anchor='end'>{k * step:.3g}</text>"
              for k in range(int(highest / step) + 1)]
    parts += [f"<text x='{place(n, 0)[0]:.1f}' y='{low + 14}' text-anchor='middle'>{n}</text>"
              for n in (1, 2, 4, 8, 16, 32, 64)]
    parts.append(f"<text x='{(left + right) / 2}' y='{low + 30}' text-anchor='middle'>budget of nodes</text>")
    x = place(budget, 0)[0]
    parts.append(f"<path d='M{x:.1f},{top}V{low}' stroke='currentColor' stroke-dasharray='1 3'/>")
    for name, rows in along.items():
        colour, dashes = looks[name]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(row[0], row[column]) for row in rows))
        parts.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2' "
                     f"stroke-dasharray='{dashes}'/>")
    ends = sorted((place(*(rows[-1][0], rows[-1][column]))[1], name) for name, rows in along.items())
    y = -math.inf
    for at, name in ends:  # names at the lines' ends, kept apart
        y = max(at + 4, y + 13)
        parts.append(f"<text x='{right + 6}' y='{y:.1f}' font-weight='600'>{name}</text>")
    if best is not None and best[0]:
        x, y = place(best[0], best[column])
        parts.append(f"<text x='{x:.1f}' y='{y + 6:.1f}' text-anchor='middle' font-size='18' data-testid='star' "
                     f"fill='{COLOURS[1]}' stroke='currentColor' stroke-width='.5'>★</text>")
    return "<figure>" + "".join([*parts, "</svg>"]) + f"<figcaption>{label}</figcaption></figure>"


def _rows(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th scope='col'>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table class='wba-table'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _steps(low: float, high: float, step: float) -> tuple[float, ...]:
    return tuple(round(low + step * k, 6) for k in range(round((high - low) / step) + 1))


def _several(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds > 0.0095 else f"{1000 * seconds:.1f} ms"
