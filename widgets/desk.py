"""What panels share whose settings a hand changes: the explorer and the schedule editor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from widgets.live import Live, told, wish
from workbench import Cancelled

PAST = 200  # settings that can be undone
FRAME = 1 / 30  # seconds between two previews of one run
PREVIEWS = 4  # times as long as a preview took until the next one: they take a fifth of the time at most

Stop = Callable[[], bool]


class Desk(Live):
    """A live panel with settings: their history, the wishes of its front end, what it does first and what ahead.

    Subclasses call `_open`, set `_start` and the present settings, and give `_settings`, `_go`, `_view`, `_actions`,
    `_asked` and `_task`. What was asked for and fails is kept for `wait` and shown as the error; what nobody asked for
    and fails is a notice, and is not tried again.
    """

    quiet: ClassVar[float] = 0.0  # seconds without a wish before idle work starts
    _start: Any

    def _open(self, name: str, published: Mapping[str, Any]) -> None:
        super()._open(name, {"view": {}, "reply": {}, **published})
        self._past: list[Any] = []
        self._future: list[Any] = []
        self._gesture: Any = None
        self._status, self._notice, self._ack = "", "", ""
        self._error: BaseException | None = None
        self._failed: set[str] = set()  # what was computed ahead in vain
        self._touched, self._is_idle = 0.0, False
        self._fresh = False  # whether a network was evaluated since the last look

    @property
    def view(self) -> dict[str, Any]:
        return self.published["view"]

    # ---- what a subclass gives

    @property
    def _settings(self) -> Any:
        """The settings wanted now."""
        raise AttributeError("_settings")

    def _go(self, wanted: Any) -> None:
        """Make `wanted` the settings, and wake."""

    def _moved(self, wanted: Any) -> None:
        """Settings were asked for; the lock is let go, and the view not told yet."""

    def _view(self) -> dict[str, Any]:
        """All that changes, as the front end gets it."""
        return {}

    def _actions(self, intent: Mapping[str, Any]) -> Mapping[str, Callable[[], object]]:
        """What the front end may ask for, by kind."""
        return {}

    def _asked(self) -> Callable[[Stop], object] | None:
        """The next thing that the settings ask for."""
        return None

    def _task(self) -> Callable[[Stop], object] | None:
        """The next useful thing while nobody asks."""
        return None

    def _at_once(self) -> None:
        """All that the settings ask for, without a worker."""

    # ---- settings and their history

    def undo(self) -> None:
        """Back to the settings before; nothing happens where there are none."""
        self._travel(self._past, self._future)

    def redo(self) -> None:
        """Forward again after `undo`."""
        self._travel(self._future, self._past)

    def reset(self) -> None:
        """The settings that the panel was opened with; `undo` brings the others back."""
        self._move(self._start)

    def _move(self, wanted: Any, gesture: Any = None) -> None:
        """Make `wanted` the settings. Moves of one gesture (one drag) are one step of the history."""
        with self._change:
            if wanted != self._settings:
                if gesture is None or gesture != self._gesture:
                    self._past.append(self._settings)
                    del self._past[:-PAST]
                self._future.clear()
            self._gesture = gesture
            self._go(wanted)
        self._moved(wanted)
        self._publish_view()

    def _travel(self, source: list[Any], target: list[Any]) -> None:
        with self._change:
            if source:
                target.append(self._settings)
                self._gesture = None
                self._go(source.pop())
        self._publish_view()

    # ---- the front end's side

    def receive(self, intent: Mapping[str, Any]) -> None:
        """One wish of the front end, a dict with "id" and "kind". What cannot be is shown as a notice, never raised."""
        intent = wish(intent)
        self._ack, self._notice = intent["id"], ""
        actions = {"undo": self.undo, "redo": self.redo, "reset": self.reset, **self._actions(intent)}
        try:
            actions[intent["kind"]]()
        except Exception as error:  # whatever it was asked for: the panel lives on
            self._notice = told(error)
        if self._notice or self.view.get("ack") != self._ack:
            self._publish_view()

    def _reply(self, intent: Mapping[str, Any], **content: Any) -> None:
        self._publish("reply", {"id": intent["id"], "kind": intent["kind"], **content})

    def _publish_view(self) -> None:
        with self._change:  # put inside, so that an older view never follows a newer one; sent once this is let go
            self._outbox.put("view", self._view())

    def _tell(self, status: str) -> None:
        self._status = status
        self._publish_view()

    @property
    def _said(self) -> dict[str, Any]:
        """What every view says: the last wish answered, what goes on, what could not be, whether there is a history."""
        return {"ack": self._ack, "status": self._status, "notice": self._notice,
                "error": "" if self._error is None else f"{type(self._error).__name__}: {self._error}",
                "can_undo": bool(self._past), "can_redo": bool(self._future)}

    # ---- the worker

    def _wake(self, quiet: bool = True) -> None:
        """Overtake whatever is under way. quiet: idle work waits until the hand rests."""
        with self._change:
            self._generation += 1
            self._error, self._is_idle, self._status = None, False, ""
            self._touched = time.monotonic() if quiet else 0.0
            self._change.ring()
        if self.is_headless:
            self._at_once()
        self._rouse()

    def _turn(self) -> float:
        with self._change:
            generation = self._generation
            task = self._asked() if self._error is None else None
            if task is None:
                rest = self._touched + self.quiet - time.monotonic()
                if rest > 0:
                    return rest
                task = self._next()
                if task is None:
                    if not self._is_idle:
                        self._is_idle = True
                        self._tell("")
                    self._change.notify_all()
                    return 5.0
        try:
            task(lambda: self._generation != generation)
        except Cancelled:
            pass
        except Exception as error:  # kept for wait() and shown; the panel lives on
            with self._change:
                if generation == self._generation:
                    self._error = error
                self._publish_view()
                self._change.notify_all()
        return 0.0

    def _next(self) -> Callable[[Stop], object] | None:
        try:
            return self._task() if self._error is None else None
        except Exception as error:  # of what nobody asked for: said, and idle work ends here
            self._idle_fault(error)
            return None

    def _idle_fault(self, error: Exception) -> None:
        """Something computed ahead failed: no error of the user's. It is named in the notice."""
        self._notice = f"computing ahead: {told(error)}"
        self._publish_view()

    def _apart(self, key: str, status: str, work: Callable[[], object]) -> None:
        self._tell(status)
        self._unasked(key, work)

    def _unasked(self, key: str, work: Callable[[], object]) -> None:
        """Do something that nobody asked for. What fails is named once and not tried again; all else goes on."""
        try:
            work()
        except Cancelled:
            raise
        except Exception as error:
            self._failed.add(key)
            self._idle_fault(error)

    def _await(self, is_so: Callable[[], Any], timeout: float, what: Any) -> None:
        """Until is_so(), and whoever listens was told. Raises what the worker caught of what was asked for."""
        with self._change:
            ready = self._change.wait_for(lambda: self._error or is_so(), timeout)
            if self._error is not None:
                raise self._error
            if not ready:
                raise TimeoutError(f"not shown after {timeout} s: {what}")
        self._settle(timeout)

    def _watched(self, name: str, network: Callable[..., Any]) -> Callable[..., Any]:
        """A network that says when it was evaluated: what memory answers takes no time, and needs no preview."""
        def watched(*rows: Any) -> Any:
            self._fresh = True
            return network(*rows)

        return watched


class Pace:
    """How often a run that goes on is drawn: for a fifth of the time at most. wait: seconds until the first time."""

    def __init__(self, wait: float = 0.0) -> None:
        self._due, self._is_first = time.monotonic() + wait, True

    def draw(self, work: Callable[[], object]) -> None:
        """Do the work, if it is due."""
        before = time.monotonic()
        if before >= self._due:
            work()
            after = time.monotonic()
            # the first may load libraries
            self._due = after + (FRAME if self._is_first else max(FRAME, PREVIEWS * (after - before)))
            self._is_first = False
