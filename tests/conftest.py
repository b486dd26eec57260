"""What holds for every test: no network, few threads, deterministic torch; and the order of the three stages."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2

# Set before anything imports torch, transformers or Panel; kernels and servers that tests start inherit it.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", PANEL_INLINE="true")
os.environ.update(TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", JUPYTER_PLATFORM_DIRS="1")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

STAGES = ("unit and contract tests", "notebooks", "browser tests, JupyterLab in Chromium")
NUMERIC = ("methods/denoising/", "methods/learning/", "methods/estimation/", "methods/recognition/", "problems/",
           "integrations/test_schedulers.py", "speculation/test_rules.py", "test_quality.py")


def _stage(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("browser") else 1 if item.get_closest_marker("notebook") else 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Benchmarks run only where they are asked for by name (`make bench`)."""
    benchmarks = ROOT / "tests" / "benchmarks"
    asked = any("benchmarks" in argument for argument in config.invocation_params.args)
    return True if collection_path == benchmarks and not asked else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", default="", help="only the tests of one family: its contract, methods and problems")


def _is_of(item: pytest.Item, family: str) -> bool:
    """Whether a test stands in the family's folders or files, or is the contract of one of its methods."""
    method = getattr(item, "callspec", None) and item.callspec.params.get("of")
    return family in item.path.as_posix().removeprefix(ROOT.as_posix()) or getattr(method, "family", "") == family


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unit tests first, browser tests last: once Playwright's event loop runs, papermill cannot start its own."""
    if family := config.getoption("--family"):
        others = [item for item in items if not _is_of(item, family)]
        items[:] = [item for item in items if _is_of(item, family)]
        config.hook.pytest_deselected(items=others)
    items.sort(key=_stage)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What compares floats that networks and samplers make is marked by where it stands."""
    where = item.path.relative_to(ROOT / "tests").as_posix() if item.path.is_relative_to(ROOT / "tests") else ""
    if where.startswith(NUMERIC) or (where == "test_contract.py" and "same_answer_whatever" in item.name):
        item.add_marker(pytest.mark.numeric)


class _Announcer:
    """Prints a heading where a new stage begins."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.stage: int | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if _stage(item) != self.stage:
            self.stage = _stage(item)
            self.reporter.ensure_newline()
            self.reporter.write_line(f"-- {STAGES[self.stage]}", bold=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, _interrupt)  # told to end, the tests first end what they have started
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(_Announcer(reporter), "stage-announcer")


@pytest.fixture(autouse=True)
def _steady_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same threads, seed and default type at the start of every test, whatever the last one did."""
    if _stage(request.node) > 0:  # notebooks and JupyterLab have processes of their own
        yield
        return
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT
