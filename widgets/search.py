"""A panel that runs a search while one looks on: start, stop, resume, the best so far and what it decides."""

from __future__ import annotations

import html
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import ipywidgets

from widgets.frontier import COLOURS
from workbench.run import Cancelled
from workbench.search import Entry, read_history

Search = Callable[..., Any]
HEADLESS_CANDIDATES = 5
FRAME = 0.15  # seconds between two drawings at least
WIDTH, HEIGHT, LEFT, BOTTOM = 620, 230, 62, 34


class SearchPanel(ipywidgets.VBox):
    """The panel of one search. Use `search_panel(...)`; as a cell's last line it shows itself.

    entries: all candidates so far, also those of former sessions that the history file holds. best: of least fitness,
    None before the first. error: what the search raised last, shown in the panel too. is_running, is_finished.
    With WORKBENCH_HEADLESS set in the environment a few candidates are evaluated at once, and errors are raised.
    """

    def __init__(self, search: Search, n_candidates: int, *, path: str | os.PathLike[str] | None = None,
                 rivals: Mapping[str, float] | None = None, label: str = "fitness", title: str = "Search") -> None:
        if n_candidates < 1:
            raise ValueError(f"n_candidates={n_candidates!r}: expected at least 1")
        self._search, self._n, self._rivals, self._label = search, n_candidates, dict(rivals or {}), label
        self._folder = tempfile.TemporaryDirectory() if path is None else None
        self.path = Path(path) if path is not None else Path(self._folder.name) / "history.jsonl"
        self.entries: list[Entry] = read_history(self.path) if self.path.exists() else []
        self.error: BaseException | None = None
        self.is_finished, self._note = False, ""
        self._stopping, self._thread, self._drawn = threading.Event(), None, 0.0

        self._go = ipywidgets.Button(button_style="primary", tooltip="Start the search, or go on with it")
        self._halt = ipywidgets.Button(description="Stop",
                                       tooltip="Stop after the candidate at hand; what is known stays")
        self._bar = ipywidgets.IntProgress(min=0, max=n_candidates, layout={"width": "260px"},
                                           tooltip="Candidates evaluated")
        self._status, self._alert, self._curve, self._found = (ipywidgets.HTML() for _ in range(4))
        self._go.on_click(lambda _: self.start())
        self._halt.on_click(lambda _: self.stop())
        super().__init__([ipywidgets.HTML(f"<b data-testid='search-title'>{html.escape(title)}</b>"),
                          ipywidgets.HBox([self._go, self._halt, self._bar]), self._status, self._alert, self._curve,
                          self._found])
        self.add_class("wb-search")
        self._draw()
        if os.environ.get("WORKBENCH_HEADLESS"):
            self._run(lambda: len(self.entries) >= HEADLESS_CANDIDATES)
            if self.error is not None:
                raise self.error

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def best(self) -> Entry | None:
        return min(self.entries, key=lambda e: e.fitness, default=None)

    def start(self) -> None:
        """Start, or go on where a stop or an error was. Does nothing while the search runs or once it is finished."""
        if self.is_running and self._stopping.is_set():
            self.wait()
        if self.is_running or self.is_finished:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(self._stopping.is_set,), name="search", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the search to stop; it does so before its next candidate or batch."""
        self._stopping.set()
        if self.is_running:
            self._halt.disabled = True

    def wait(self, timeout: float | None = None) -> None:
        """Until the search has stopped or finished. Raises TimeoutError after timeout seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the search still runs after {timeout} s")

    def _run(self, is_stopped: Callable[[], bool]) -> None:
        self.error = None
        self._draw(is_running=True)
        try:
            found = self._search(path=self.path, stop=is_stopped, on_entry=self._told)
            self._note = getattr(getattr(found, "history", found), "note", "")  # of S3's history, AutoDiffusion's Found
            self.is_finished = True
        except Cancelled:
            pass
        except Exception as error:  # whatever a user's model or fitness raises; it is shown, and kept
            self.error = error
        self._draw()

    def _told(self, entry: Entry) -> None:
        self.entries.append(entry)
        if time.monotonic() - self._drawn > FRAME:
            self._draw(is_running=True)

    def _draw(self, is_running: bool = False) -> None:
        self._drawn = time.monotonic()
        n, best = len(self.entries), self.best
        self._go.description = "Finished" if self.is_finished else "Resume" if n else "Start"
        self._go.disabled, self._halt.disabled = is_running or self.is_finished, not is_running
        self._bar.value = min(n, self._n)
        self._bar.bar_style = "success" if self.is_finished else "danger" if self.error else "info"
        state = ("running" if is_running else "finished" if self.is_finished else "failed" if self.error
                 else "stopped" if n else "not started")
        said = [f"{state}: {n} of {self._n} candidates", f"{sum(e.evaluations for e in self.entries):,} evaluations"]
        if best is not None:
            said.append(f"best {self._label} {best.fitness:.4g}")
        said += [f"{name} {value:.4g}" for name, value in self._rivals.items()]
        said += [self._note] if self._note else []
        self._status.value = (f"<span role='status' data-testid='search-status' data-state='{state}'>"
                              f"{html.escape('; '.join(said))}</span>")
        self._alert.value = "" if self.error is None else (
            "<div role='alert' data-testid='search-error' style='color:#b00020'>"
            f"{html.escape(f'{type(self.error).__name__}: {self.error}')}</div>")
        self._curve.value = curve([e.fitness for e in self.entries], self._n, self._rivals, self._label)
        self._found.value = "" if best is None else table(best.candidate)


def search_panel(search: Search, n_candidates: int, *, path: str | os.PathLike[str] | None = None,
                 rivals: Mapping[str, float] | None = None, label: str = "fitness", title: str = "Search"
                 ) -> SearchPanel:
    """A panel that runs a search in the background: start, stop, resume, best so far, and the best candidate.

    search(path=, stop=, on_entry=) is a search with everything else given, e.g. functools.partial(s3.search, fitness,
    space, n_candidates=200). n_candidates: how many it will evaluate, for the bar. path: its history, where a search
    of a former session goes on (default: a file as long-lived as the panel). rivals: {name: fitness} of what it is
    compared with, drawn as lines. label: of the fitness. Raises ValueError where n_candidates is less than 1.
    """
    return SearchPanel(search, n_candidates, path=path, rivals=rivals, label=label, title=title)


def curve(fitness: Sequence[float], n_candidates: int, rivals: Mapping[str, float], label: str) -> str:
    """SVG: a dot per candidate, the best so far as a line, rivals as dashed lines; worse ones lie on the upper edge."""
    best = list(accumulate(fitness, min))
    shown = [v for v in (*best, *rivals.values()) if math.isfinite(v)]
    if not shown:
        return ""
    is_log = min(shown) > 0
    scale = math.log10 if is_log else float
    low, high = scale(min(shown)), scale(max(shown))
    low, high = low - 0.08 * (high - low or 1), high + 0.3 * (high - low or 1)
    right, lowest = WIDTH - 12, HEIGHT - BOTTOM

    def x(i: float) -> float:
        return LEFT + (right - LEFT) * i / max(n_candidates, len(fitness))

    def y(value: float) -> float:
        at = high if not math.isfinite(value) else min(scale(value) if not is_log or value > 0 else low, high)
        return lowest - (lowest - 10) * (at - low) / (high - low)

    said = f"best {label} so far {best[-1]:.4g} after {len(best)} candidates; " if best else ""
    said += "; ".join(f"{name} {value:.4g}" for name, value in rivals.items())
    parts = [f"<svg role='img' data-testid='search-curve' data-n='{len(best)}' aria-label='{html.escape(said, True)}' "
             f"viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' font-size='11' fill='currentColor'>",
             f"<path d='M{LEFT},10V{lowest}H{right}' stroke='currentColor' fill='none' opacity='.5'/>"]
    marks = [low + (high - low) * k / 3 for k in range(4)]
    values = [10**at if is_log else at for at in marks]
    digits = next((d for d in range(2, 12) if len({f"{v:.{d}g}" for v in values}) == 4), 12)  # each another text
    parts += [f"<text x='{LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.{digits}g}</text>"
              for value in values]
    parts.append(f"<text x='{(LEFT + right) / 2}' y='{HEIGHT - 6}' text-anchor='middle'>candidates</text>")
    parts += [f"<text x='{x(i)}' y='{lowest + 14}' text-anchor='middle'>{i}</text>" for i in (0, n_candidates)]
    dots = "".join(f"M{x(i + 1):.1f},{y(v):.1f}h.01" for i, v in enumerate(fitness))
    parts.append(f"<path d='{dots}' stroke='{COLOURS[4]}' stroke-width='3' stroke-linecap='round' opacity='.6'/>")
    if best:
        steps = "".join(f"H{x(i + 1):.1f}V{y(v):.1f}" for i, v in enumerate(best))
        parts.append(f"<path d='M{x(1):.1f},{y(best[0]):.1f}{steps}' stroke='{COLOURS[0]}' stroke-width='2' "
                     "fill='none'/>")
    for k, (name, value) in enumerate(rivals.items()):
        colour = COLOURS[1 + 2 * (k % 2)]
        parts.append(f"<path d='M{LEFT},{y(value):.1f}H{right}' stroke='{colour}' stroke-dasharray='6 4' fill='none'/>"
                     f"<text x='{right}' y='{y(value) - 4:.1f}' text-anchor='end' fill='{colour}'>"
                     f"{html.escape(name)}</text>")
    return "".join([*parts, "</svg>"])


def table(candidate: Mapping[str, Any]) -> str:
    """A candidate of S3 (a plan's JSON) or of AutoDiffusion (timesteps, skips) as an HTML table, a row per step."""
    if "decisions" in candidate:
        heads = ("step", "from time", "predicts", "order", "relaxation", "expands", "corrector")
        rows = [(i, f"{t:.4g}", d["prediction"], d["expansion"]["order"], d["expansion"]["relaxation"],
                 f"{d['start']} back" if d["start"] else "here", d["corrector"])
                for i, (t, d) in enumerate(zip(candidate["times"], candidate["decisions"], strict=True), 1)]
    else:
        heads = ("step", "from time", "skipped blocks")
        rows = [(i, f"{t:.4g}", ", ".join(skips) or "none")
                for i, (t, skips) in enumerate(zip(candidate["timesteps"], candidate["skips"], strict=True), 1)]
    head = "".join(f"<th scope='col' style='padding:0 .7em;text-align:left'>{h}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td style='padding:0 .7em'>{html.escape(str(c))}</td>" for c in row) + "</tr>"
                   for row in rows)
    return (f"<table data-testid='search-best' style='line-height:1.4'><caption style='text-align:left'>the best so far"
            f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
