"""The explorer as a page of its own, on the embedded models: `panel serve widgets/app.py`."""

from __future__ import annotations

from typing import Any

import panel as pn
import param

from widgets.explorer import HERE, Explorer, explorer
from workbench.problems.glyphs import glyphs


class ExplorerPane(pn.custom.AnyWidgetComponent):
    """An Explorer in a Panel page, drawn by the same code as in JupyterLab. Wishes come through `intent`."""

    _esm = HERE / "explorer.js"
    _stylesheets = [HERE / "explorer.css"]
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
        of.subscribe(lambda name, value: pn.state.execute(lambda: self.param.update(**{name: value}), schedule=True))


if pn.state.served:
    # the tab's title; the explorer itself has its headings
    pn.config.sizing_mode = "stretch_width"
    ExplorerPane(explorer(glyphs()), max_width=1280).servable(title="Sampling Workbench")
