"""Decoding in the explorer: text that appears block by block, each block's draft tree, and every verification rule's
acceptance beside the optimum."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import widgets
from widgets.view import Page, Pane, Stop, View, measured, shows
from workbench import METHODS, Cost, Inputs, Run, Step, Timing
from workbench.problems.language import docs
from workbench.speculation.acceptance import optimal
from workbench.speculation.drafting import draw
from workbench.speculation.engine import Block
from workbench.speculation.rules import RULES

if TYPE_CHECKING:
    from widgets.explorer import Explorer

FAMILY = ("spectr", "speculative", "spec_infer", "sequoia", "eagle2", "autoregressive")
FIXED = {"speculative": "single", "sequoia": "rrs_without", "eagle2": "top"}  # the rule of methods without that knob
SLOW = ("importance", "optimal")  # rules whose acceptance takes some 10 ms
TRIALS = 200  # draws by which the acceptance of a rule without a closed form is estimated, per block
SCORED = 16  # texts that the settings shown are graded with while idle
SCORES = (64, 256)  # numbers of texts that the panel offers beside
KEPT = 64_000_000  # bytes of laws kept, of runs to which one may return
BACKGROUND = ("top_k", "top_p", "typical_p", "policy", "threshold", "draft", "model")  # in a title only where changed


@dataclass(frozen=True)
class Place:
    """A block's context: laws (V,) of target and draft there, the drafts that stood there, whether one was kept."""

    target_probs: np.ndarray
    draft_probs: np.ndarray
    n_drafts: int
    is_hit: bool


@dataclass
class Trace:
    """What one run wrote in its first text. blocks: as JSON; places: None where nothing was drafted.

    bars: per block, {rule or optimum: (acceptance, standard error)} as far as it is computed; graded: all of it is.
    """

    blocks: list[str] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    bars: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    graded: set[int] = field(default_factory=set)
    n_tokens: int = 0

    @property
    def n_bytes(self) -> int:
        return sum(p.target_probs.nbytes + p.draft_probs.nbytes for p in self.places if p is not None)


def quick_bars(place: Place) -> dict[str, tuple[float, float]]:
    """Acceptance at a place of every rule and optimum that takes about a millisecond; for one draft, of all."""
    laws, n = (place.target_probs, place.draft_probs), place.n_drafts
    found = {name: rule.acceptance(*laws, n) for name, rule in RULES.items()
             if _takes(name, n) and (name not in SLOW or n == 1)}
    found["optimum iid"] = optimal(*laws, n, "iid").acceptance
    if n <= 2:
        found["optimum without"] = optimal(*laws, n, "without").acceptance
    return {name: (value, 0.0) for name, value in found.items() if value is not None}


def slow_bars(place: Place, rule: str | None) -> dict[str, tuple[float, float]]:
    """The others: convex and linear programs, quadrature, and, for a `rule` of no closed form, TRIALS draws."""
    laws, n = (place.target_probs, place.draft_probs), place.n_drafts
    found: dict[str, tuple[float, float]] = {}
    if n > 1:
        found = {name: (RULES[name].acceptance(*laws, n), 0.0) for name in SLOW if _takes(name, n)}
    if n > 2:
        found["optimum without"] = optimal(*laws, n, "without").acceptance, 0.0
    if rule is not None and RULES[rule].accepted is None:
        rng, chosen = np.random.default_rng(0), RULES[rule]
        hits = sum(chosen.verify(*laws, draw(place.draft_probs, n, chosen.drafting, rng.random),
                                 lambda: float(rng.random())).draft is not None for _ in range(TRIALS))
        share = hits / TRIALS
        found[rule] = share, math.sqrt(share * (1 - share) / TRIALS + 0.25 / TRIALS**2) / (1 + 1 / TRIALS)
    return found


def _takes(rule: str, n: int) -> bool:
    most = RULES[rule].max_drafts
    return most is None or n <= most


@shows("decoding")
class DecodingView(View):
    """The first text, its blocks' trees, and acceptance by rule at the selected block's context.

    blocks: of the first text shown, per target pass: texts of its tokens, the first n_accepted drafted, and the tree.
    bars: acceptance at each block, by rule and optimum, with their means.
    """

    methods = FAMILY
    n_samples = 1
    scores = SCORES
    scored = SCORED
    carried = ("n_tokens", "temperature", "top_k", "top_p", "typical_p")
    main_metric = "block_efficiency"
    is_pooled = True
    per = "token"
    pages = (Page("drafts", "Drafts", "How many drafts are worth it?", lambda: widgets.explorer(docs())),)

    def __init__(self, panel: Explorer) -> None:
        super().__init__(panel)
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._growing: tuple[str, Trace] = "", Trace()  # of the run under way
        self._current: tuple[str, str | None, Trace] = "", None, Trace()  # key, rule and trace of what is shown
        self._selected = 0
        self._texts: dict[int, str] = {}

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return [json.loads(block) for block in self._current[2].blocks]

    @property
    def bars(self) -> dict[str, Any]:
        return self.panel.published["detail"]

    def select(self, item: int) -> None:
        """Look at another block. Raises ValueError where the text shown has no such block."""
        n = len(self._current[2].blocks)
        if item not in range(max(n, 1)):
            raise ValueError(f"block={item!r}: expected 0 to {n - 1}, the blocks of the text shown")
        self._selected = item
        self._publish_bars(item)

    def n_steps(self, given: Inputs) -> int | None:
        return None

    def words(self, given: Inputs) -> Iterator[str]:
        """All but what only narrows the laws, which is named where it differs from rest."""
        for name, value in given.knobs.items():
            bound = METHODS[given.method].knobs[name]
            if name in BACKGROUND and value == bound.default:
                continue
            if bound.kind is tuple:
                value = "-".join(f"{entry:g}" for entry in value)
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words = name.removeprefix("n_").replace("_", " ")
            yield f"{text} tokens" if name == "n_tokens" else f"{words} {text}"

    def neighbours(self, now: Inputs) -> Iterator[dict[str, Any]]:
        return iter(())  # each costs as much as the run shown

    def _rule(self, given: Inputs) -> str | None:
        return given.knobs.get("rule", FIXED.get(given.method))

    # ---- along a run

    def begins(self, given: Inputs) -> None:
        self._growing = given.key, Trace()

    def saw(self, given: Inputs, step: Step, cost: Cost) -> None:
        key, trace = self._growing
        block = step.info["blocks"].get(0)  # none once the first text has ended before others
        if block is not None and key == given.key:
            self._add(trace, block)
            self._traces[key] = trace
            self._traces.move_to_end(key)
            while len(self._traces) > 1 and sum(t.n_bytes for t in self._traces.values()) > KEPT:
                self._traces.popitem(last=False)

    def is_drawable(self, run: Run) -> bool:
        return run.inputs.key in self._traces

    def forgets(self, key: str) -> None:
        self._traces.pop(key, None)

    def ahead(self, shown: Run) -> Iterator[tuple[str, str, Callable[[Stop], None]]]:
        """All rules at all blocks."""
        key, rule, trace = self._current
        waiting = [k for k, place in enumerate(trace.places) if place is not None and k not in trace.graded]
        if waiting:
            block = self._selected if self._selected in waiting else waiting[0]
            yield f"block {block} of {key}", "comparing rules", lambda stop: self._grade(trace, rule, block)

    # ---- what is drawn

    def spec(self) -> dict[str, Any]:
        return {"rules": {name: rule.drafting for name, rule in RULES.items()},
                "models": [{"name": m.name, "letter": m.name[:2], "colour": k}
                           for k, m in enumerate(self.problem.models)]}

    @cached_property
    def _prompt(self) -> str:
        return self.problem.text(self.problem.prompts(1)[0])

    def panes(self, run: Run) -> list[Pane]:
        return self._text_pane(run.inputs, self._traces.get(run.inputs.key, Trace()), is_done=True)

    def early(self, given: Inputs, step: Step) -> list[Pane]:
        return self._text_pane(given, self._traces.get(given.key, Trace()), is_done=False)

    def _text_pane(self, given: Inputs, trace: Trace, *, is_done: bool) -> list[Pane]:
        return [Pane("text", "text", {"prompt": self._prompt, "n_tokens": trace.n_tokens, "of": given.knobs["n_tokens"],
                                      "blocks": [json.loads(block) for block in trace.blocks]})]

    def shown(self, given: Inputs, *, is_done: bool) -> None:
        """A frame of these settings is about to be published: its bars follow by themselves."""
        trace = self._traces.get(given.key, Trace())
        if given == self.panel.inputs:
            is_new = self._current[2] is not trace
            self._current = given.key, self._rule(given), trace
            if is_done:
                self._selected = min(self._selected, max(len(trace.blocks) - 1, 0))
            if is_new or is_done:
                self._publish_bars(self._selected)

    def per_run(self, run: Run) -> float:
        return int((run.answer[..., 0] >= 0).sum())

    def costs(self, run: Run, timing: Timing | None) -> list[dict[str, Any]]:
        n, names = self.per_run(run), [m.name for m in self.problem.models]
        return [{"id": "evaluations", "name": "positions per token",
                 "parts": [run.cost.evaluations[m] / n for m in names]},
                {"id": "flops", "name": "FLOPs per token", "parts": [run.cost.flops[m] / n for m in names]}]

    def lines(self, run: Run, reference: Run | None) -> list[dict[str, str]]:
        """Passes of each model, the arithmetic factor, and the speed against plain decoding."""
        found = []
        for model in reversed(self.problem.models):
            if n := run.cost.calls[model.name]:
                positions = run.cost.evaluations[model.name]
                texts = f", all {run.inputs.n_samples} texts" if run.inputs.n_samples > 1 else ""
                found.append({"id": "passes", "name": model.name, "value": f"{n} pass{'es' * (n != 1)}",
                              "note": f"{positions} position{'s' * (positions != 1)}{texts}, prompt included"})
        if reference is not None:
            own, plain = (r.cost.total_flops / self.per_run(r) for r in (run, reference))
            found.append({"id": "factor", "name": "arithmetic factor", "value": f"× {own / plain:.3g}",
                          "note": f"{own:.3g} FLOPs per token; plain decoding {plain:.3g}"})
            times = [self.panel.timings.get(r.inputs.key) for r in (run, reference)]
            if all(times):
                (a, n), (b, m) = ((t, self.per_run(r)) for t, r in zip(times, (run, reference), strict=True))
                speed = (b.seconds / m) / (a.seconds / n)
                error = speed * math.hypot(a.spread / a.seconds, b.spread / b.seconds)
                found.append({"id": "speed", "name": "speed", "value": f"× {measured(speed, error)}",
                              "note": f"of plain decoding's, {1e3 * b.seconds / m:.3g} ms per token; {a.machine}"})
        return found

    def _add(self, trace: Trace, block: Block) -> None:
        """One more block: its place, and its JSON. Probabilities of the target are known at nodes that it walked to."""
        tree, path = block.tree, block.accepted
        target: dict[int, float] = {}
        for node in (-1, *path):
            for child in tree.children.get(node, ()):
                target[child] = _short(block.laws[node][tree.tokens[child]])
        times = Counter(child for children in tree.children.values() for child in children)
        own = None
        if len(block.tokens) > len(path):
            law, token = block.laws[path[-1] if path else -1], block.tokens[-1]
            own = self._text(token), _short(law[token])
        nodes = range(tree.n_nodes)
        drawn = json.dumps({
            "texts": [self._text(token) for token in block.tokens], "n_accepted": min(len(path), len(block.tokens)),
            "n_passes": block.n_draft_passes, "path": path, "own": own, "parents": tree.parents,
            "nodes": [self._text(token) for token in tree.tokens], "times": [times[node] for node in nodes],
            "draft": [_short(tree.laws[tree.parents[node]][tree.tokens[node]]) for node in nodes],
            "target": [target.get(node) for node in nodes]})
        first = tree.children.get(-1)
        place = Place(np.array(block.laws[-1]), np.array(tree.laws[-1]), len(first), bool(path)) if first else None
        with self.panel.change:
            trace.blocks.append(drawn)
            trace.places.append(place)
            trace.bars.append({})
            trace.n_tokens += len(block.tokens)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.problem.text([token])
        return self._texts[token]

    def _grade(self, trace: Trace, rule: str | None, block: int) -> None:
        place = trace.places[block]
        found = quick_bars(place) | slow_bars(place, rule)
        with self.panel.change:
            trace.bars[block] = found
            trace.graded.add(block)
        if block == self._selected or len(trace.graded) % 8 == 0 or len(trace.graded) == sum(map(bool, trace.places)):
            self._publish_bars(self._selected)

    def _publish_bars(self, block: int) -> None:
        """The bars of all blocks that are computed, and of this one in any case, with their means."""
        key, rule, trace = self._current
        if block < len(trace.places) and trace.places[block] is not None and not trace.bars[block]:
            found = quick_bars(trace.places[block])
            with self.panel.change:
                trace.bars[block] = trace.bars[block] or found
        with self.panel.change:
            bars = [dict(b) for b in trace.bars]
            graded = [bars[k] for k in sorted(trace.graded)]
            places = [p for p in trace.places if p is not None]
            n_drafts = [0 if p is None else p.n_drafts for p in trace.places]
        names = {name for b in graded for name in b}
        mean = {name: sum(b[name][0] for b in having) / len(having) for name in names
                if (having := [b for b in graded if name in b])}
        self.panel.publish("detail", {"key": key, "rule": rule, "blocks": bars, "n_drafts": n_drafts, "mean": mean,
                               "n_graded": len(graded), "hits": sum(p.is_hit for p in places), "n": len(places)})


def _short(probability: float) -> float:
    """Four digits, so that a frame stays small."""
    return float(f"{probability:.4g}")
