"""The panels of one picture: sliders or buttons beside panes, a line of status, a still for hosts without a front end.

`Panel` is what they share; `LivePanel` is the controller of those with sliders: it keeps their values, and its worker
draws the newest ones first. js/panel.js shows what they publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from widgets.live import Live, bundle, script, told
from widgets.view import Pane, still

HERE = Path(__file__).parent
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
    panes: Sequence[Pane]
    status: str
    key: str
    code: str
    numbers: dict[str, Any] = field(default_factory=dict)


class Panel(Live):
    """A title, panes, a status. It publishes "spec" once, and "view"."""

    _panes: Sequence[Pane] = ()

    def receive(self, wish: Mapping[str, Any]) -> None:
        """One wish of the front end. What cannot be is said in the panel, never raised."""
        try:
            self._receive(wish)
        except Exception as error:  # whatever it was asked for: the panel lives on
            self._say(error=told(error))

    def _receive(self, wish: Mapping[str, Any]) -> None:
        """Do what is asked, or raise."""

    def _say(self, *, panes: Sequence[Pane] | None = None, **news: Any) -> None:
        """Publish the view with these changes."""
        with self._change:
            if panes is not None:
                self._panes = panes
                news["panes"] = [{"name": pane.name, "kind": pane.kind, **pane.told} for pane in panes]
            self._outbox.put("view", {**self.published["view"], **news})

    @cached_property
    def widget(self) -> PanelWidget:
        return PanelWidget(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return bundle(self, **kwargs)

    def _still(self) -> dict[str, Any]:
        """What is shown, as plain text and, where there is a picture, as PNG."""
        view = self.published["view"]
        lines = [text for text in (view["title"], view["status"], view["error"]) if text]
        for pane in self._panes:
            lines += [f"{item['label']}: {item['text']}" for item in pane.told.get("items", ())]
            lines += [" | ".join(map(str, row)) for row in (pane.told.get("head"), *pane.told.get("rows", ())) if row]
        picture = still(view["title"], self._panes)
        return {"text/plain": "\n".join(lines)} | ({"image/png": picture} if picture else {})


class PanelWidget(anywidget.AnyWidget):
    """A Panel in JupyterLab. Wishes come as messages, results go as traits: each is set by one side only."""

    _esm = script("core.js", "ticks.js", "plot.js", "panes.js", "panel.js")
    _css = "\n".join((HERE / name).read_text() for name in ("explorer.css", "panel.css"))
    spec = traitlets.Dict().tag(sync=True)
    view = traitlets.Dict().tag(sync=True)

    def __init__(self, panel: Panel) -> None:
        super().__init__()
        self.on_msg(lambda widget, wish, buffers: panel.receive(wish))
        panel.subscribe(lambda name, value: setattr(self, name, value))


class LivePanel(Panel):
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
        self._open(name, {"spec": self._spec(), "view": {
            "values": dict(self.values), "title": name, "panes": [], "status": "", "key": "", "code": "", "error": ""}})
        self._drawn = -1  # the generation that is
        self._wake()

    def _spec(self) -> dict[str, Any]:
        return {"name": self._name, "sliders": [s.spec() for s in self.sliders.values()]}

    def set(self, **values: float) -> None:
        """Move sliders. Raises ValueError for a name that is none, or a value that the slider does not reach."""
        sliders, moved = dict(self.sliders), self.values
        for name, value in values.items():  # what is refused or raises leaves all as it was
            if name not in sliders:
                raise ValueError(f"{name}: no slider of this panel; it has {', '.join(sliders)}")
            sliders[name] = replace(sliders[name], start=value)
            moved = self._changed({**moved, name: value}, name)
        self.sliders = sliders
        self._publish("spec", self._spec())
        self._take(moved)

    def _receive(self, wish: Mapping[str, Any]) -> None:
        """{"knob", "index"} of a slider, or {"point", "x", "y"} of a point dragged."""
        if "knob" in wish:
            slider = self.sliders[wish["knob"]]
            index = int(wish["index"])
            if not 0 <= index < len(slider.values):
                raise ValueError(f"{slider.name}: place {index}, expected 0 to {len(slider.values) - 1}")
            self._take(self._changed({**self.values, slider.name: slider.values[index]}, slider.name))
        elif self._move is not None:
            self._take(self._move(self.values, wish["point"], float(wish["x"]), float(wish["y"])))

    def wait(self, timeout: float = 60) -> None:
        """Until the newest values are drawn. Raises what drawing them raised, or TimeoutError after timeout seconds."""
        self._rouse()
        with self._change:
            if not self._change.wait_for(lambda: self._drawn == self._generation, timeout):
                raise TimeoutError(f"not drawn within {timeout} s")
            if self.error is not None:
                raise self.error
        self._settle(timeout)

    def _take(self, values: Values) -> None:
        with self._change:
            self.values = values
            self._generation += 1
        self._wake()

    def _wake(self) -> None:
        with self._change:
            self._change.ring()
        self._rouse()
        if self.is_headless:
            self._turn()
            if self.error is not None:
                raise self.error

    def _turn(self) -> float:
        """Draw the newest values; what is overtaken is given up between its drawings."""
        with self._change:
            generation, values = self._generation, dict(self.values)
        if self._drawn == generation:
            return 5.0

        def is_late() -> bool:
            return self._generation != generation

        error = None
        try:
            for shown in self._draw(values, is_late):
                self.numbers = shown.numbers
                self._say(values=values, title=shown.title, panes=shown.panes, status=shown.status, key=shown.key,
                          code=shown.code, error="")
                if is_late():
                    break
        except Exception as raised:  # whatever a user's laws or cost curve raise; it is shown, and kept
            error = raised
            self._say(values=values, error=f"{type(raised).__name__}: {raised}")
        with self._change:
            if not is_late():
                self.error, self._drawn = error, generation
                self._change.notify_all()
        return 0.0


def steps(low: float, high: float, step: float) -> tuple[float, ...]:
    """The places of a slider."""
    return tuple(round(low + step * k, 6) for k in range(round((high - low) / step) + 1))


def several(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def in_ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds > 0.0095 else f"{1000 * seconds:.1f} ms"
