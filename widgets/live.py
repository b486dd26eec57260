"""What every live panel stands on: how it publishes, locks, works in the background and is put to sleep.

Rule: nothing is published, and no listener called, while a panel's lock is held. `Guard` keeps it by construction:
what is put into the outbox under the lock is delivered when the lock is let go.
"""

from __future__ import annotations

import atexit
import base64
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

MAX_AWAKE = 8  # panels with a worker and memories of their own; the one longest untouched sleeps until it is touched
MAX_SAMPLES = 2000  # that a panel may be asked for: more would take gigabytes in the process that serves it
MAX_TEXT = 1_000_000  # characters of a text that a front end may send
_log = logging.getLogger(__name__)
Listener = Callable[[str, Any], None]


def script(*names: str) -> str:
    """Files of the front end, one after the other, as one module."""
    return "\n".join((Path(__file__).parent / "js" / name).read_text() for name in names)


def wish(given: Any) -> dict[str, Any]:
    """What a front end sent, as a dict with an "id" and a "kind"; whatever else came becomes a wish of no kind."""
    made = dict(given) if isinstance(given, Mapping) else {}
    if any(isinstance(value, str) and len(value) > MAX_TEXT for value in made.values()):
        made = {"id": made.get("id", "")}
    return {"kind": "", **made, "id": str(made.get("id", ""))[:100]}


def told(error: BaseException) -> str:
    """An error in one sentence for a panel."""
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else error!r}: no such thing here"[:500]
    text = str(error.args[0]) if error.args else repr(error)
    return (text if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {text}")[:500]


def bundle(panel: Any, **kwargs: Any) -> Any:
    """A panel as a cell's output: its widget, and for hosts without it what is shown, as text and as a picture."""
    if panel.is_headless:
        return _encoded(panel._still())
    made = panel.widget._repr_mimebundle_(**kwargs)
    data, more = made if isinstance(made, tuple) else (made, {})
    with suppress(Exception):  # the first picture, if it comes soon
        panel.wait(1.0)
    return {**data, **_encoded(panel._still())}, more


def _encoded(shown: Mapping[str, Any]) -> dict[str, str]:
    return {name: base64.b64encode(part).decode() if isinstance(part, bytes) else part for name, part in shown.items()}


class Outbox:
    """Named values and those who listen: each value is delivered to each listener once, in the order of `put`.

    One thread delivers at a time; what others put meanwhile it delivers too. A listener that raises is named in the log
    and loses that value only.
    """

    def __init__(self, published: Mapping[str, Any]) -> None:
        self.published = dict(published)
        self._listeners: list[Listener] = []
        self._waiting: deque[tuple[str, Any, list[Listener]]] = deque()
        self._lock, self._sender = threading.Condition(), 0  # the thread that delivers
        self._sent = 0  # how many were delivered

    def put(self, name: str, value: Any) -> None:
        with self._lock:
            self.published[name] = value
            self._waiting.append((name, value, list(self._listeners)))

    def subscribe(self, listener: Listener) -> None:
        """The listener gets what there is, and all that follows."""
        with self._lock:
            self._waiting.extend((name, value, [listener]) for name, value in self.published.items())
            self._listeners.append(listener)

    def send(self) -> None:
        while True:
            with self._lock:
                if self._sender or not self._waiting:
                    return
                self._sender = threading.get_ident()
                name, value, listeners = self._waiting.popleft()
            try:
                for listener in listeners:
                    try:
                        listener(name, value)
                    except Exception:
                        _log.exception("a listener failed on %r", name)
            finally:
                with self._lock:
                    self._sender, self._sent = 0, self._sent + 1
                    self._lock.notify_all()

    def settle(self, timeout: float) -> None:
        """Until all that was put before is delivered, by whichever thread; at once for a listener, who would wait for
        itself."""
        with self._lock:
            wanted = self._sent + len(self._waiting) + (self._sender != 0)
            if self._sender != threading.get_ident():
                self._lock.wait_for(lambda: self._sent >= wanted, timeout)


class Guard:
    """A reentrant lock with a condition, which sends an outbox once it is let go."""

    def __init__(self, outbox: Outbox) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._outbox, self._owner, self._depth = outbox, 0, 0
        self.rung = 0  # how often the worker was called

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> Guard:
        self._condition.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        is_free = not self._depth
        if is_free:
            self._owner = 0
        self._condition.release()
        if is_free:
            self._outbox.send()

    def notify_all(self) -> None:
        """Something is done: for those in `wait_for`. A worker that rests goes on resting."""
        self._condition.notify_all()

    def ring(self) -> None:
        """Something is to be done: the worker rests no longer."""
        self.rung += 1
        self._condition.notify_all()

    def wait_for(self, is_so: Callable[[], Any], timeout: float | None = None) -> Any:
        """Let go until is_so(), at most `timeout` seconds; what it gave last."""
        depth, self._owner, self._depth = self._depth, 0, 0

        def asked() -> Any:
            self._owner, self._depth = threading.get_ident(), depth
            found = is_so()
            if not found:
                self._owner, self._depth = 0, 0
            return found

        try:
            return self._condition.wait_for(asked, timeout)
        finally:
            self._owner, self._depth = threading.get_ident(), depth

    def rest(self, rung: int, timeout: float) -> None:
        """Wait, unless it was rung since: at most `timeout` seconds."""
        with self:
            if self.rung == rung:
                self.wait_for(lambda: self.rung != rung, timeout)


class Live:
    """The base of panels with a worker: subclasses call `_open` first, and give `_turn` and `_release`."""

    _awake: ClassVar[OrderedDict[int, weakref.ref[Live]]] = OrderedDict()
    _awake_lock: ClassVar[Any] = threading.Lock()

    def _open(self, name: str, published: Mapping[str, Any]) -> None:
        self._outbox = Outbox(published)
        self._change = Guard(self._outbox)
        self._generation, self._is_closed = 0, False
        self._worker: threading.Thread | None = None
        self._worker_name = name
        self.is_headless = bool(os.environ.get("WORKBENCH_HEADLESS"))

    @property
    def published(self) -> dict[str, Any]:
        return self._outbox.published

    def subscribe(self, listener: Listener) -> None:
        """listener(name, value) is called for each thing published, from any thread; at once for what there is."""
        self._outbox.subscribe(listener)
        self._send()

    def _publish(self, name: str, value: Any) -> None:
        self._outbox.put(name, value)
        self._send()

    def _send(self) -> None:
        if not self._change.is_mine:  # else when the lock is let go
            self._outbox.send()

    def _settle(self, timeout: float) -> None:
        """Until whoever listens was told of all so far."""
        if not self._change.is_mine:
            self._outbox.settle(timeout)

    def _turn(self) -> float:
        """Do the next piece of work; the seconds to rest before the next turn, 0 for none."""
        return 5.0

    def _release(self) -> None:
        """Let go of what can be computed again."""

    def _rouse(self) -> None:
        """See to it that a worker is there; of too many panels the longest untouched goes to sleep."""
        if self.is_headless:
            return
        with Live._awake_lock:
            Live._awake.pop(id(self), None)
            Live._awake[id(self)] = weakref.ref(self)
            known = [(key, ref()) for key, ref in Live._awake.items()]
            for key, panel in known:
                if panel is None:
                    del Live._awake[key]
            tired = [panel for _, panel in known if panel is not None][:-MAX_AWAKE]
            for panel in tired:
                del Live._awake[id(panel)]
        with self._change:
            if self._worker is None or self._is_closed:
                self._is_closed = False
                self._worker = threading.Thread(target=_attend, args=(weakref.ref(self), self._change),
                                                name=self._worker_name, daemon=True)
                self._worker.start()
        for panel in tired:
            panel.sleep()

    def sleep(self) -> None:
        """End the worker and let go of what can be computed again. A touch wakes the panel up."""
        with self._change:
            self._is_closed = True
            self._generation += 1
            self._release()
            self._change.ring()


def _attend(ref: weakref.ref[Live], change: Guard) -> None:
    """The worker: keeps no panel alive that nobody else holds."""
    while (panel := ref()) is not None and panel._worker is threading.current_thread() and not panel._is_closed:
        rung = change.rung
        seconds = panel._turn()
        del panel
        if seconds:
            change.rest(rung, seconds)


@atexit.register
def _end() -> None:
    """End the workers before the interpreter does: torch does not survive being cut off in the middle."""
    with Live._awake_lock:
        panels = [panel for ref in Live._awake.values() if (panel := ref()) is not None]
    for panel in panels:
        worker = panel._worker
        panel.sleep()
        if worker is not None:
            worker.join(10)
