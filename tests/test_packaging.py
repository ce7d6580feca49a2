import ast
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points, packages_distributions, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import iclevr_diffusion

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES_OF_COMMANDS = ("compare", "evaluate", "inspect", "picture", "render", "sample")


def requirements(lines: list[str], python: str | None = None, extra: str = "") -> dict[str, Requirement]:
    """The requirements that hold for a Python version (this one by default) and an extra, by canonical name."""
    environment = {"extra": extra} | ({"python_version": python} if python else {})
    parsed = [Requirement(line) for line in lines]
    kept = [
        requirement for requirement in parsed if not requirement.marker or requirement.marker.evaluate(environment)
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in kept}


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert iclevr_diffusion.__version__ == version("iclevr_diffusion") == citation["version"]


def test_the_commands_can_be_called():
    commands = [command for command in entry_points(group="console_scripts") if command.name.startswith("iclevr-")]
    assert {command.name for command in commands} == {f"iclevr-{name}" for name in NAMES_OF_COMMANDS}
    assert all(callable(command.load()) for command in commands)


@pytest.mark.parametrize("folder", ["iclevr_diffusion", "train_scripts"])
def test_every_imported_package_is_a_declared_dependency(folder):
    declared = set(requirements(requires("iclevr_diffusion")))
    # Imported where they are used, with an error that names the extra.
    optional = {"matplotlib": "eval", "sklearn": "digits", "torch_fidelity": "fid"}
    optional |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx")
    for name, extra in optional.items():
        name = {"sklearn": "scikit-learn"}.get(name, name)
        assert canonicalize_name(name) in requirements(requires("iclevr_diffusion"), extra=extra)
    providers = packages_distributions()
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in (
                {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"iclevr_diffusion", *optional}
            ):
                assert {canonicalize_name(each) for each in providers[name]} & declared, (path, name)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize("extra", ["", "dev", "digits", "eval", "onnx", "test", "tracking"])
def test_the_constraints_pin_every_dependency_within_its_bounds(python, extra):
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = requirements([line for line in lines if not line.startswith("#")], python)
    for name, requirement in requirements(requires("iclevr_diffusion"), python, extra).items():
        if name != "iclevr-diffusion":
            (pin,) = pins[name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), name


FAKE_PYTHON = """#!/bin/sh
# Stands in for Python: makes an environment of itself, and writes down what pip and the commands are asked for.
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && for name in python iclevr-sample iclevr-evaluate; do cp "$0" "$3/bin/$name"; done ;;
    "-m pip "*) echo pip >> log; [ ! -e pip-fails ] ;;
    "-m pytest "*) echo pytest >> log ;;
    "-c import sys"*) [ ! -e is-old ] ;;
    "-c import ensurepip"*) [ ! -e has-no-venv ] ;;
    "--version") echo Python 3.9.1 ;;
    *) basename "$0" >> log ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs `make` in a folder of its own with a stand-in for Python; returns its status, errors and what was called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def make(target: str) -> tuple[int, str, list[str]]:
        (tmp_path / "log").write_text("")
        command = ["make", target, f"PYTHON={python}"]
        environment = {"PATH": os.environ["PATH"]}
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return finished.returncode, finished.stderr, (tmp_path / "log").read_text().split()

    return make


def test_make_demo_installs_once(make):
    drawing = ["iclevr-sample", "iclevr-evaluate"]
    assert make("demo") == (0, "", ["pip", *drawing])
    assert make("demo") == (0, "", drawing)


def test_make_test_adds_what_the_tests_need(make):
    make("demo")
    assert make("test") == (0, "", ["pip", "pytest"])
    assert make("test") == (0, "", ["pytest"])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_make_installs_again_when_the_requirements_have_changed(make, tmp_path, name):
    make("demo")
    stamp = (tmp_path / ".venv" / ".installed").stat().st_mtime
    os.utime(tmp_path / name, (stamp + 1, stamp + 1))
    os.utime(tmp_path / ".venv" / ".installed", (stamp, stamp))
    assert make("demo")[2] == ["pip", "iclevr-sample", "iclevr-evaluate"]


def test_make_begins_anew_after_an_installation_that_was_cut_off(make, tmp_path):
    (tmp_path / "pip-fails").touch()
    assert make("demo")[0] != 0
    (tmp_path / ".venv" / "half-written").touch()
    (tmp_path / "pip-fails").unlink()
    assert make("demo")[2] == ["pip", "iclevr-sample", "iclevr-evaluate"]
    assert not (tmp_path / ".venv" / "half-written").exists()


def test_make_keeps_an_environment_that_it_did_not_break(make, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "of-the-developer").touch()
    assert make("demo")[0] == 0
    assert (tmp_path / ".venv" / "of-the-developer").exists()


@pytest.mark.parametrize(
    ("lack", "message"),
    [("is-old", "Python 3.10 or newer is needed"), ("has-no-venv", "has no venv module"), (None, "no nowhere here")],
)
def test_make_says_what_is_wrong_with_the_python_it_was_given(make, tmp_path, lack, message):
    if lack:
        (tmp_path / lack).touch()
    else:
        (tmp_path / "Makefile").write_text("override PYTHON := nowhere\n" + (REPOSITORY / "Makefile").read_text())
    status, errors, called = make("demo")
    assert status != 0 and message in errors and not called
