"""A JupyterLab of its own and a hermetic Chromium for the browser tests. What a test needs, all of it:

    pytestmark = pytest.mark.browser

    def test_explorer(page, traffic):                  # fixtures of conftest.py; `lab` is the server
        open_notebook(page, "00_start_here.ipynb")     # in a copy of notebooks/; returns when the kernel is idle
        run_all(page)                                  # returns when every cell has run; raises if one raised
        handle = page.get_by_role("slider").first
        drag(page, handle, 80)                         # by mouse, 80 pixels to the right
        handle.press("ArrowRight")                     # by key
        expect(page.get_by_text("steps = 7")).to_be_visible(timeout=1000)
        assert not is_blank(page.locator("img").first)  # or a canvas: pixels, not only an element
        assert_local(traffic)                          # nothing left this machine, nothing failed

Three traps that this file keeps away from the tests: the toolbar shows an idle kernel before the session has one, and
running then opens a dialogue and waits for ever; the promise of the run-all command may never be kept; a kernel left
over from the test before makes the next one look fast.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import psutil
from playwright.sync_api import Error, Locator, Page, TimeoutError

BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# Styles that Panel asks of its content network even where its scripts come along; what it shows works without them.
PANEL_STYLES = re.compile(r"^https://cdn\.holoviz\.org/panel/[^?]*\.css(\?|$)")
MAX_PANEL_STYLES = 3


def system_chromium() -> str | None:
    """The path of the system's Chromium, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@dataclass
class Traffic:
    """What a page asked for and what went wrong in it, from its opening to its closing."""

    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # "why: address"
    page_errors: list[str] = field(default_factory=list)
    console_errors: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("requestfailed", self._failed)
        page.on("response", self._answered)
        page.on("pageerror", lambda error: self.page_errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.console_errors.append(line.text))

    def _answered(self, answer: Any) -> None:
        if answer.status >= 400:
            self.failed.append(f"{answer.status}: {answer.url}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED" or not _is_local(request.url):  # the page was left: no fault
            self.failed.append(f"{request.failure}: {request.url}")


def _is_local(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in {"data", "blob", "about"} or parts.hostname in LOOPBACK


def assert_local(traffic: Traffic) -> None:
    """No request left loopback, none failed, no page error. Up to three missing styles of Panel are let pass."""
    styles = {address for address in traffic.requests if PANEL_STYLES.match(address)}
    away = sorted({address for address in traffic.requests if not _is_local(address)} - styles)
    assert away == [], f"these requests left the machine: {away}"
    assert len(styles) <= MAX_PANEL_STYLES, f"more styles of Panel than known: {sorted(styles)}"
    failed = [line for line in traffic.failed if line.partition(": ")[2] not in styles]
    assert failed == [], f"these requests failed: {failed}"
    assert traffic.page_errors == [], f"errors in the page: {traffic.page_errors}"
    fatal = re.compile(r"could not create a view|error loading", re.IGNORECASE)
    broken = [line for line in traffic.console_errors if fatal.search(line)]
    assert broken == [], f"errors in the console: {broken}"


class Lab:
    """A JupyterLab server on a free port of this machine, over a copy of some notebooks, with a private configuration.

    url and notebooks (the copy's folder) are for tests to use. stop() ends it and all that it started.
    """

    def __init__(self, folder: Path, notebooks: Path | None) -> None:
        self.notebooks = folder / "notebooks"
        if notebooks is None:
            self.notebooks.mkdir(parents=True)
        else:
            skip = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
            shutil.copytree(notebooks, self.notebooks, ignore=skip)
        settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
        settings.mkdir(parents=True)
        # every cell is in the page, also those out of sight
        (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        private = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
        private |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "IPYTHONDIR": str(folder / "ipython"),
                    "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_PREFER_ENV_PATH": "1",
                    "JUPYTER_CONFIG_PATH": str(Path(__file__).resolve().parents[2] / "binder" / "jupyter")}
        options = [
            "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
            "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.allow_root=True",
            "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={self.notebooks}",
            "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True",
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=self.notebooks,
                                            env={**os.environ, **private}, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait(180)
        except BaseException:  # also where pytest's timeout or Ctrl-C strikes: no fixture knows of the server yet
            self.stop()
            raise

    def _wait(self, seconds: float) -> None:
        last = time.monotonic() + seconds
        while time.monotonic() < last and self.process.poll() is None:
            try:
                self._api("GET", "status")
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not answer within {seconds} s:\n{self.log.read_text()[-2000:]}")

    def _api(self, verb: str, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}/api/{path}", method=verb)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def add(self, name: str, *cells: str) -> None:
        """Write a notebook with these code cells into the copy."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.notebooks / name)

    def shut_kernels(self) -> None:
        """End every kernel, so that the next notebook gets a new one."""
        for session in self._api("GET", "sessions"):
            self._api("DELETE", f"sessions/{session['id']}")
        for kernel in self._api("GET", "kernels"):
            self._api("DELETE", f"kernels/{kernel['id']}")

    def stop(self) -> None:
        """End the server and whatever it started, each by its own id. May be called twice."""
        try:
            server = psutil.Process(self.process.pid)
            ours = [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            ours = []
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in ours:
            try:
                process.kill()  # psutil refuses where the id has gone to another process
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(ours, timeout=10)


_STATE = """() => {
  const widget = window.jupyterapp?.shell?.currentWidget, context = widget?.context?.sessionContext;
  if (!widget?.content?.widgets || !context) return null;
  const cells = widget.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.source.trim());
  const errors = cells.flatMap(c => c.model.outputs.toJSON().filter(o => o.output_type === 'error'));
  return {
    path: widget.context.path, ready: context.isReady && widget.context.isReady,
    kernel: context.session?.kernel?.connectionStatus === 'connected' ? context.session.kernel.status : 'none',
    cells: cells.length, ran: cells.filter(c => c.model.executionCount !== null).length,
    errors: errors.map(e => (e.traceback ?? []).join('\\n') || `${e.ename}: ${e.evalue}`),
  };
}"""


def _until(page: Page, what: str, is_reached: Any, seconds: float) -> None:
    """Poll the open notebook's state. Raises TimeoutError with the last state."""
    last, state = time.monotonic() + seconds, None
    while time.monotonic() < last:
        try:
            state = page.evaluate(_STATE)
        except Error:  # the page is being replaced
            state = None
        if state and is_reached(state):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(f"{what}: not within {seconds} s; state {state}")


def open_notebook(page: Page, name: str, seconds: float = 90) -> None:
    """Open a notebook of the copy in a fresh workspace; return when its session's kernel is idle."""
    page.goto(f"/lab/workspaces/test-{time.time_ns()}/tree/{name}")

    def is_ready(state: dict[str, Any]) -> bool:
        return state["path"].endswith(name) and state["ready"] and state["kernel"] == "idle"

    _until(page, f"opening {name}", is_ready, seconds)


def run_all(page: Page, seconds: float = 150) -> None:
    """Run every cell; return when all have run and the kernel is idle. Raises AssertionError where a cell raises."""
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")  # not waited for

    def is_done(state: dict[str, Any]) -> bool:
        assert state["errors"] == [], re.sub(r"\x1b\[[0-9;]*m", "", state["errors"][0])
        return state["ran"] == state["cells"] and state["kernel"] == "idle"

    _until(page, "running all cells", is_done, seconds)


def drag(page: Page, handle: Locator, pixels: float, moves: int = 8) -> None:
    """Take the handle by mouse and pull it sideways, in some moves as a hand does."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box, "the handle is not visible"
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    for move in range(1, moves + 1):
        page.mouse.move(x + pixels * move / moves, y)
        page.wait_for_timeout(30)
    page.mouse.up()


def is_blank(element: Locator) -> bool:
    """Whether the element's pixels are all of nearly one colour: what a picture or plot that failed looks like."""
    from PIL import Image

    shown = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
    shown = shown.crop((4, 4, shown.width - 4, shown.height - 4))  # neighbours' pixels may reach over an edge
    return all(high - low < 16 for low, high in shown.getextrema())
