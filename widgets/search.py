"""A panel that runs a search while one looks on: start, stop, resume, the best so far and what it decides."""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from widgets.panel import Panel
from widgets.view import Pane
from widgets.view import curve as drawn
from workbench.runs import Cancelled
from workbench.search import Entry, read_history

Search = Callable[..., Any]
HEADLESS_CANDIDATES = 5
FRAME = 0.15  # seconds between two drawings at least


class SearchPanel(Panel):
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
        self._open("search", {"spec": {"name": "search", "prefix": "search-", "sliders": []},
                              "view": {"title": title, "values": {}, "code": "", "error": ""}})
        self._draw()
        if self.is_headless:
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
            self._joined(None)
        if self.is_running or self.is_finished:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(self._stopping.is_set,), name="search", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the search to stop; it does so before its next candidate or batch."""
        self._stopping.set()
        if self.is_running:
            self._draw(is_running=True)

    def sleep(self) -> None:
        """As `stop`: a touch of Resume wakes it up."""
        self.stop()

    def wait(self, timeout: float | None = None) -> None:
        """Until the search has stopped or finished. Raises what it raised, or TimeoutError after timeout seconds."""
        self._joined(timeout)
        if self.error is not None:
            raise self.error

    def _joined(self, timeout: float | None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the search still runs after {timeout} s")

    def _receive(self, wish: Mapping[str, Any]) -> None:
        """{"press": "start" or "stop"}."""
        {"start": self.start, "stop": self.stop}[wish["press"]]()

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
        entries, best = list(self.entries), self.best
        n = len(entries)
        state = ("running" if is_running else "finished" if self.is_finished else "failed" if self.error
                 else "stopped" if n else "not started")
        said = [f"{state}: {n} of {self._n} candidates", f"{sum(e.evaluations for e in entries):,} evaluations"]
        if best is not None:
            said.append(f"best {self._label} {best.fitness:.4g}")
        said += [f"{name} {value:.4g}" for name, value in self._rivals.items()]
        said += [self._note] if self._note else []
        go = "Finished" if self.is_finished else "Resume" if n else "Start"
        self._say(
            panes=[*curve([e.fitness for e in entries], self._n, self._rivals, self._label),
                   *([] if best is None else [table(best.candidate)])],
            key=f"{n} {state}", state=state, status="; ".join(said), share=min(n / self._n, 1),
            error="" if self.error is None else f"{type(self.error).__name__}: {self.error}",
            buttons=[{"press": "start", "text": go, "help": "Start the search, or go on with it",
                      "disabled": is_running or self.is_finished},
                     {"press": "stop", "text": "Stop", "help": "Stop after the candidate at hand; what is known stays",
                      "disabled": not is_running or self._stopping.is_set()}])


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


def curve(fitness: Sequence[float], n_candidates: int, rivals: Mapping[str, float], label: str) -> list[Pane]:
    """A dot per candidate, the best so far as a line, rivals as dashed lines; worse ones lie on the upper edge."""
    best = list(accumulate(fitness, min))
    shown = [v for v in (*best, *rivals.values()) if math.isfinite(v)]
    if not shown:
        return []
    is_log = min(shown) > 0
    worst = max(shown) + (max(shown) - min(shown)) / 2
    at = [(i, v) for i, v in enumerate(best, 1) if math.isfinite(v)]
    lines: list[dict[str, Any]] = [
        {"label": "best so far", "x": [i for i, _ in at], "y": [v for _, v in at], "colour": 0, "bare": True}]
    lines += [{"label": name, "x": [0, n_candidates], "y": [value, value], "faint": True}
              for name, value in rivals.items() if math.isfinite(value)]
    marks = [{"x": i, "y": min(v, worst) if v == v else worst, "text": f"candidate {i}: {label} {v:.4g}", "colour": 1}
             for i, v in enumerate(fitness, 1) if not is_log or v > 0]
    said = f"best {label} so far {best[-1]:.4g} after {len(best)} candidates; " if best else ""
    said += "; ".join(f"{name} {value:.4g}" for name, value in rivals.items())
    caption = "dots on the upper edge: worse still" if any(not v <= worst for v in fitness) else ""
    return [drawn("search-curve", lines, x="candidates", y=label, better="down", log_y=is_log, marks=marks, said=said,
                  n=len(best), caption=caption)]


def table(candidate: Mapping[str, Any]) -> Pane:
    """A candidate of S3 (a plan's JSON) or of AutoDiffusion (timesteps, skips) as a table, a row per step."""
    if "decisions" in candidate:
        head = ("step", "from time", "predicts", "order", "relaxation", "expands", "corrector")
        rows = [(i, f"{t:.4g}", d["prediction"], d["expansion"]["order"], d["expansion"]["relaxation"],
                 f"{d['start']} back" if d["start"] else "here", d["corrector"])
                for i, (t, d) in enumerate(zip(candidate["times"], candidate["decisions"], strict=True), 1)]
    else:
        head = ("step", "from time", "skipped blocks")
        rows = [(i, f"{t:.4g}", ", ".join(skips) or "none")
                for i, (t, skips) in enumerate(zip(candidate["timesteps"], candidate["skips"], strict=True), 1)]
    return Pane("search-best", "table", {"head": head, "rows": rows, "caption": "the best so far"})
