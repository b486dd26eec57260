"""pyproject.toml, requirements.lock, environment.yml and Binder's files say the same; Binder reads the ones we mean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

# conda's name for what the Python index calls otherwise
CONDA_NAMES = {"pytorch-cpu": "torch", "pytorch-gpu": "torch", "pytorch": "torch"}


def project_requirements(text: str) -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    """The ranges of the dependencies and those of the test extra, by normalised name."""
    project = tomllib.loads(text)["project"]
    groups = project["dependencies"], project["optional-dependencies"]["test"]
    runtime, test = (
        {canonicalize_name(r.name): r.specifier for r in map(Requirement, group)} for group in groups
    )
    return runtime, test


def pins(text: str) -> dict[str, Version]:
    """The lock's packages. Raises ValueError at a line that is no plain pin, such as a path or a local build."""
    found = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.!]+)", line)
        if match is None:
            raise ValueError(f"not a plain pin: {line}")
        found[canonicalize_name(match[1])] = Version(match[2])
    return found


def conda_requirements(text: str) -> dict[str, SpecifierSet]:
    """The ranges of a conda environment file, by the normalised names of the Python index."""
    found = {}
    for entry in yaml.safe_load(text)["dependencies"]:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", entry)
        name = canonicalize_name(CONDA_NAMES.get(match[1], match[1]))
        found[name] = SpecifierSet(re.sub(r"^=(?!=)(.*)", r"==\1.*", match[2]))
    return found


def disagreements(pyproject: str, lock: str, conda: str) -> list[str]:
    """Where the three do not say the same."""
    runtime, test = project_requirements(pyproject)
    locked, environment = pins(lock), conda_requirements(conda)
    wrong = []
    for name, allowed in {**runtime, **test}.items():
        if name not in locked:
            wrong.append(f"{name} is not in the lock")
        elif locked[name] not in allowed:
            wrong.append(f"{name} {locked[name]} is locked, {allowed} is declared")
    for name, allowed in runtime.items():
        if name not in environment:
            wrong.append(f"{name} is not in the conda environment")
        elif environment[name] != allowed:
            wrong.append(f"{name}: conda has {environment[name]}, pyproject {allowed}")
    for name in environment.keys() - runtime.keys() - {"python", "pip", "setuptools"}:
        wrong.append(f"{name} is in the conda environment only")
    return wrong


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, str]:
    names = "pyproject.toml", "requirements.lock", "environment.yml"
    return {name: (root / name).read_text() for name in names}


def test_declared_locked_and_conda_packages_agree(files):
    assert disagreements(*files.values()) == []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "complaint"),
    [
        ("requirements.lock", r"^safetensors==.*\n", "", "safetensors is not in the lock"),
        ("requirements.lock", r"^papermill==.*$", "papermill==1.0", "papermill 1.0 is locked"),
        ("environment.yml", r"^  - holoviews.*\n", "", "holoviews is not in the conda environment"),
        ("environment.yml", r"panel>=.*$", "panel>=0.1", "panel: conda has >=0.1"),
        ("environment.yml", r"^  - pytorch-cpu.*\n", "", "torch is not in the conda environment"),
        ("pyproject.toml", r'    "anywidget.*\n', "", "anywidget is in the conda environment only"),
    ],
)
def test_a_disagreement_is_found(files, name, pattern, replacement, complaint):
    broken, count = re.subn(pattern, replacement, files[name], count=1, flags=re.MULTILINE)
    assert count == 1
    wrong = disagreements(*{**files, name: broken}.values())
    assert any(complaint in line for line in wrong), wrong


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "torch>=2", "-e .", "x @ file:///somewhere/x.whl"])
def test_the_lock_takes_only_plain_pins(line):
    with pytest.raises(ValueError, match="not a plain pin"):
        pins(line)


def test_the_installed_environment_is_whole(root):
    """Every dependency is installed within its range: what the other tests pass on is what we declare."""
    from importlib.metadata import version

    runtime, test = project_requirements((root / "pyproject.toml").read_text())
    declared = {**runtime, **test}
    assert {name: version(name) for name, allowed in declared.items() if version(name) not in allowed} == {}


def test_binder_and_conda_read_the_same_environment(root):
    assert (root / "binder" / "environment.yml").read_text() == (root / "environment.yml").read_text()


def test_python_versions_agree(root):
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"]
    conda = conda_requirements((root / "environment.yml").read_text())["python"]
    assert str(conda) == "==3.11.*"
    assert "3.11" in SpecifierSet(declared)
    assert "3.10" not in SpecifierSet(declared)


def buildpack(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What repo2docker would build the folder with: its own detection, in Python, without Docker."""
    app = pytest.importorskip("repo2docker.app").Repo2Docker()
    monkeypatch.chdir(folder)
    return next((pack for pack in (kind(app.base_image) for kind in app.buildpacks) if pack.detect()), None)


def test_binder_takes_the_conda_buildpack(root, monkeypatch):
    pack = buildpack(root, monkeypatch)
    assert type(pack).__name__ == "CondaBuildPack"
    assert pack.binder_path("environment.yml") == "binder/environment.yml"
    assert pack.python_version == "3.11"
    assert pack.get_post_build_scripts() == ["binder/postBuild"]
    assert pack.get_start_script().endswith("binder/start")


def test_binder_folder_hides_the_root_files(tmp_path, monkeypatch):
    """Why binder/ repeats environment.yml: with a binder folder in place repo2docker no longer sees the root's."""
    (tmp_path / "environment.yml").write_text("dependencies: [python=3.11]\n")
    assert type(buildpack(tmp_path, monkeypatch)).__name__ == "CondaBuildPack"
    (tmp_path / "binder").mkdir()
    assert type(buildpack(tmp_path, monkeypatch)).__name__ != "CondaBuildPack"


@pytest.mark.parametrize("name", ["binder/postBuild", "binder/start", ".ci/run"])
def test_scripts_can_be_run(root, name):
    assert os.access(root / name, os.X_OK), f"{name} is not executable"
    subprocess.run(["bash", "-n", str(root / name)], check=True)


def test_start_hands_over_with_its_settings(root):
    shown = subprocess.run(
        [str(root / "binder" / "start"), sys.executable, "-c", "import os; print(dict(os.environ))"],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    ).stdout
    assert "'PANEL_INLINE': 'true'" in shown
    assert "'OMP_NUM_THREADS': '2'" in shown


def test_nothing_is_downloaded_by_binder_scripts(root):
    for name in ("postBuild", "start"):
        assert not re.search(r"curl|wget|https?://|snapshot_download", (root / "binder" / name).read_text())


@pytest.mark.slow
def test_the_wheel_carries_code_weights_and_front_end(root, tmp_path):
    """What is installed without -e holds all that the packages need at run time."""
    import shutil

    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("workbench", "widgets"):
        shutil.copytree(root / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(root / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("sampling_workbench-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    weights = [path for path in (root / "workbench" / "zoo" / "weights").rglob("*") if path.is_file()]
    front_end = [path for kind in ("*.js", "*.css") for path in (root / "widgets").rglob(kind)]
    code = [path for folder in ("workbench", "widgets") for path in (root / folder).rglob("*.py")]
    wanted = {path.relative_to(root).as_posix() for path in weights + front_end + code}
    assert wanted <= packed, sorted(wanted - packed)


def test_make_takes_the_pythons_that_the_package_takes(root):
    low, high = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (root / "pyproject.toml").read_text()).groups()
    makefile = (root / "Makefile").read_text()
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in makefile
    assert " ".join(f"python3.{minor}" for minor in range(int(low), int(high))) in makefile
