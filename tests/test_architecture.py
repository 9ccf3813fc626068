"""The house rules that a reader of one file cannot see broken."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vicvlm_cli

PACKAGE = Path(vicvlm_cli.__file__).parent
# Imports go down this list or stay on their level, never up.
LEVELS = [
    {"config", "settings", "errors", "device"},
    {"model"},
    {"objectives", "evaluation", "gallery", "data", "report", "checkpoint", "inference"},
    {"workflows"},
    {"cli", "console", "options", "remembered", "__main__"},
]
SPEAKING = {"cli", "console", "options"}
HEAVY = {"torch", "timm", "transformers", "datasets", "accelerate", "numpy", "PIL", "pyarrow"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package but its front door, by dotted name below ``vicvlm_cli``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of everything imported, at the top or inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(module: str) -> int:
    room = module.split(".")[0]
    found = [i for i, rooms in enumerate(LEVELS) if room in rooms]
    assert found, f"{module} has no level: give it one in {Path(__file__).name}"
    return found[0]


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for name in imports(MODULES[module]):
        package, _, inner = name.partition(".")
        if package == "vicvlm_cli" and not inner.startswith("__version__"):
            assert level(inner) <= level(module), f"{module} imports {inner}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] not in SPEAKING])
def test_the_core_neither_prints_nor_exits_nor_parses_arguments(module):
    tree = MODULES[module]
    forbidden = {"argparse", "sys.exit", "typer", "click"}
    for name in imports(tree):
        assert name not in forbidden and name.split(".")[0] not in {"argparse", "typer", "click"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "exit", "sys.exit", "os._exit"}


def test_third_party_imports_are_declared():
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = pyproject[pyproject.index("dependencies = [") : pyproject.index("[project.scripts]")]
    declared = {name.lower() for name in re.findall(r'"([A-Za-z0-9_-]+)[><=;\[]', block)}
    spelled = {"PIL": "pillow", "tomllib": "tomli", "yaml": "pyyaml"}
    for module, tree in MODULES.items():
        for name in imports(tree):
            package = name.split(".")[0]
            if package == "vicvlm_cli" or package in sys.stdlib_module_names:
                continue
            assert spelled.get(package, package) in declared, f"{module} imports {package}"


@pytest.mark.parametrize("module", ["vicvlm_cli", "vicvlm_cli.cli", "vicvlm_cli.config"])
def test_importing_the_front_door_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == ""


def test_public_names_are_there():
    for name in vicvlm_cli.__all__:
        assert getattr(vicvlm_cli, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = vicvlm_cli.nothing_of_the_kind
