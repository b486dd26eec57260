"""The explorer as a page of its own, on the embedded models: `python -m widgets.app`, for this machine only.

Everything is served from here: nothing is fetched from a network. A page's explorer is built once its browser has
opened the page's connection, and goes when the page is closed.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any, ClassVar

import panel as pn
import param

from widgets.explorer import HERE, Explorer, explorer
from widgets.live import script
from workbench.problems.glyphs import glyphs

MAX_PAGES = 8  # open at a time; each may take some hundred megabytes
_open: set[Explorer] = set()
_lock = threading.Lock()


class ExplorerPane(pn.custom.AnyWidgetComponent):
    """An Explorer in a Panel page, drawn by the same code as in JupyterLab. Wishes come through `intent`."""

    _esm = script("ticks.js", "explorer.js")
    _stylesheets: ClassVar[list[str]] = [(HERE / "explorer.css").read_text()]
    spec = param.Dict({})
    view = param.Dict({})
    frontier = param.Dict({})
    reply = param.Dict({})
    frame = param.Bytes(b"")
    pinned = param.Bytes(b"")
    intent = param.Dict({})

    def __init__(self, of: Explorer, **params: Any) -> None:
        super().__init__(**{**of.published, **params})
        self.param.watch(lambda event: of.receive(event.new), "intent")
        # the worker's thread publishes; what it says is sent by the page's own event loop
        of.subscribe(lambda name, value: pn.state.execute(lambda: self.param.update(**{name: value}), schedule=True))

    def _process_param_change(self, params: dict[str, Any]) -> dict[str, Any]:
        """Without Panel's own style sheets: it would fetch them from its content network, and none is needed."""
        properties = super()._process_param_change(params)
        if "stylesheets" in properties:
            properties["stylesheets"] = [sheet for sheet in properties["stylesheets"] if isinstance(sheet, str)]
        return properties


def page() -> pn.Column:
    """One page. Its explorer comes with the page's connection, so that what only fetches the address builds nothing."""
    column = pn.Column(sizing_mode="stretch_width", max_width=1280)

    def opened() -> None:
        with _lock:
            is_full = len(_open) >= MAX_PAGES
        if is_full:
            column.append(pn.pane.HTML(f"{MAX_PAGES} pages are open already, and no more are served at a time. "
                                       "Close one and load this page again."))
            return
        made = explorer(glyphs())
        with _lock:
            _open.add(made)

        def closed(_: Any) -> None:
            with _lock:
                _open.discard(made)
            made.sleep()

        pn.state.on_session_destroyed(closed)
        column.append(ExplorerPane(made, sizing_mode="stretch_width", max_width=1280))

    pn.state.onload(opened)
    return column


def main(arguments: list[str] | None = None) -> None:
    """Serve the page until the process is ended. Connections from pages of other origins are refused."""
    parser = argparse.ArgumentParser(prog="python -m widgets.app", description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=5006)
    parser.add_argument("--address", default="127.0.0.1", help="another one lets other machines in, without a login")
    parser.add_argument("--show", action="store_true", help="open a browser")
    given = parser.parse_args(arguments)
    hosts = {given.address, "127.0.0.1", "localhost"}
    pn.serve({"app": page}, address=given.address, port=given.port, show=given.show, title="Sampling Workbench",
             websocket_origin=[f"{host}:{given.port}" for host in sorted(hosts)], liveness=True,
             unused_session_lifetime=5000, check_unused_sessions=2000)


if __name__ == "__main__":
    main()
