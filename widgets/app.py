"""The explorer as a page of its own, on the embedded models: `panel serve widgets/app.py`."""

from __future__ import annotations

from typing import Any, ClassVar

import panel as pn
import param

from widgets.explorer import HERE, Explorer, explorer
from workbench.problems.glyphs import glyphs


class ExplorerPane(pn.custom.AnyWidgetComponent):
    """An Explorer in a Panel page, drawn by the same code as in JupyterLab. Wishes come through `intent`."""

    _esm = HERE / "explorer.js"
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


if pn.state.served:
    ExplorerPane(explorer(glyphs()), sizing_mode="stretch_width", max_width=1280).servable(title="Sampling Workbench")
