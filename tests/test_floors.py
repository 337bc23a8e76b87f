"""The package's folders are floors: imports run downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "xdp_erm_py"

# From the lowest up. What stands beside the folders is either for all floors, or a command or what commands show.
COMMON = {"config", "config_file", "errors", "modules", "printable", "settings", "shared", "sudo"}
FLOORS = [{"kernel"}, {"program"}, {"interface"}, {"display", "lab", "publish"}, {"systemd"}, {"doctor"}, {"cli"},
          {"__main__"}]


def floor(place: str) -> int:
    """How high a folder or a file of the package stands."""
    return next((number for number, places in enumerate(FLOORS) if place in places), -1)


def imported(file: Path) -> set[str]:
    """The folders and files of the package that a file imports from, in functions as well."""
    inside = file.relative_to(PACKAGE).parts[:-1]
    places = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        where = [*inside[:len(inside) - node.level + 1], *(node.module or "").split(".")]
        places.update([where[0]] if where[0] else [alias.name for alias in node.names])
    return places


def place_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_place_has_a_floor():
    places = {place_of(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert places == COMMON.union(*FLOORS)


@pytest.mark.parametrize("file", [pytest.param(file, id=str(file.relative_to(PACKAGE)))
                                  for file in sorted(PACKAGE.rglob("*.py"))])
def test_imports_run_downwards(file):
    here = place_of(file)
    upwards = {name for name in imported(file) - COMMON - {here, "__version__"} if floor(name) >= floor(here)}
    assert not upwards, f"{here} imports {', '.join(sorted(upwards))}, which stands no lower"
