"""The explorers and panels as pages of their own, on the embedded models, for this machine only.

`python -m widgets.app`, or `panel serve widgets/app.py`. Everything is served from here: nothing is fetched from a
network. The start page has a tile for each panel. A page's panel is built once its browser has opened the page's
connection, is no other page's, and goes when the page is closed.
"""

from __future__ import annotations

import argparse
import functools
import html
import threading
from typing import Any

import panel as pn
import param

from widgets.acceptance import acceptance_explorer
from widgets.editor import schedule_editor
from widgets.trees import tree_explorer
from widgets.view import Page, view_of
from workbench import FAMILIES
from workbench.problems.glyphs import glyphs

MAX_PAGES = 8  # open at a time; each may take some hundred megabytes
_open: set[Any] = set()
_lock = threading.Lock()


def pages() -> dict[str, Page]:
    """What is served, by name: the pages of every family's view, then the special panels."""
    found = {page.name: page for family in FAMILIES for page in view_of(family).pages}
    return found | {page.name: page for page in (
        Page("schedule", "Schedule editor", "Where should the steps lie?", lambda: schedule_editor(glyphs())),
        Page("acceptance", "Acceptance", "How often can drafts be accepted at best?", acceptance_explorer),
        Page("trees", "Trees", "Which tree of drafts makes the most of a budget?", tree_explorer))}


@functools.cache
def _pane_of(widget: type) -> type:
    """A Panel component drawn by the same code as a widget in JupyterLab. Wishes come through `intent`."""
    own = {name: {"Dict": param.Dict({}), "Bytes": param.Bytes(b"")}[type(trait).__name__]
           for name, trait in widget.class_own_traits(sync=True).items() if not name.startswith("_")}
    return type(widget.__name__, (_Pane,), {"_esm": str(widget._esm), "_stylesheets": [str(widget._css)], **own,
                                            "intent": param.Dict({})})


class _Pane(pn.custom.AnyWidgetComponent):
    def __init__(self, of: Any, **params: Any) -> None:
        published = {name: value for name, value in of.published.items() if name in self.param}
        super().__init__(**{**published, **params})
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
    """The page that the address asks for by ?panel=name, or the start page.

    Its panel comes with the page's connection, so that what only fetches the address builds nothing.
    """
    known = pages()
    asked = pn.state.session_args.get("panel", [b""])[0].decode(errors="replace") if pn.state.session_args else ""
    if asked not in known:
        return start(known)
    column = pn.Column(sizing_mode="stretch_width")

    def opened() -> None:
        with _lock:
            is_full = len(_open) >= MAX_PAGES
        if is_full:
            column.append(pn.pane.HTML(f"{MAX_PAGES} pages are open already, and no more are served at a time. "
                                       "Close one and load this page again."))
            return
        made = known[asked].make()
        with _lock:
            _open.add(made)

        def closed(_: Any) -> None:
            with _lock:
                _open.discard(made)
            getattr(made, "sleep", lambda: None)()

        pn.state.on_session_destroyed(closed)
        # traits added to an instance make it a class of its own
        declared = next(kind for kind in type(made.widget).__mro__ if "spec" in vars(kind))
        column.append(_pane_of(declared)(made, sizing_mode="stretch_width"))

    pn.state.onload(opened)
    return column


def start(known: dict[str, Page]) -> pn.Column:
    """A tile for each page."""
    tiles = "".join(f"<a class='tile' href='?panel={name}'><b>{html.escape(p.title)}</b>{html.escape(p.question)}</a>"
                    for name, p in known.items())
    text = (f"{LOOK}<main><h1>Sampling Workbench</h1><p>How few steps, how small a model, how many drafts, and "
            f"what does it cost? Each tile opens a live panel on an embedded model.</p><div class='tiles'>{tiles}</div>"
            "</main>")
    return pn.Column(pn.pane.HTML(text, sizing_mode="stretch_width"), sizing_mode="stretch_width")


LOOK = """<style>
main { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 24px auto; }
h1 { font-size: 24px; margin: 0 0 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { display: grid; gap: 4px; padding: 14px 16px; border: 1px solid #8886; border-radius: 6px; color: inherit;
        text-decoration: none; }
.tile:hover, .tile:focus-visible { border-color: #1565c0; outline: 1px solid #1565c0; }
</style>"""


def main(arguments: list[str] | None = None) -> None:
    """Serve the pages until the process is ended. Connections from pages of other origins are refused."""
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
elif pn.state.served:  # by `panel serve`
    page().servable(title="Sampling Workbench")
