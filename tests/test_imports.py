"""Imports run downward, in the order of the design; and what must start fast does not load torch."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xloom

SOURCE = Path(xloom.__file__).parent
ORDER = (
    "errors", "hub", "config", "gating", "experts", "modules", "fused", "call", "site", "mixture", "routers", "cache",
    "checkpoints", "wrapping", "architecture", "trace", "blocks", "passes", "decoding", "loading", "model",
    "classification", "merging", "suite", "training", "collapse", "seeing", "report", "evaluation", "benchmark", "cli",
    "__main__",
)  # fmt: skip
SUITE_MAY_IMPORT = {"errors", "hub"}
MAY_IMPORT_SUITE = {"training", "evaluation", "benchmark", "cli"}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The name in `ORDER` that a file belongs to; "" for xloom/__init__.py."""
    inside = path.relative_to(SOURCE).parts
    return inside[0].removesuffix(".py") if inside != ("__init__.py",) else ""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of xloom, inside functions and for types alike."""
    package = ["xloom", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            names = [".".join([*home, alias.name]) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "xloom")


def part(name: str) -> str:
    """Of a dotted name, what stands in `ORDER`; "" for the package itself."""
    return (name.split(".") + [""])[1]


def test_every_module_has_its_place():
    found = {part_of(path) for path in FILES} - {""}
    assert found <= set(ORDER), f"not in the order of the design: {sorted(found - set(ORDER))}"
    assert {"errors", "model", "checkpoints", "mixture"} <= found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path):
    mine = part_of(path)
    if mine == "":
        return  # imports for types alone, and by name: `test_import_xloom_is_light`
    for line, name in imported(path):
        theirs = part(name)
        where = f"{path.relative_to(SOURCE)}:{line}"
        if theirs == mine:
            continue
        # `from xloom import __version__` is fine; any other name on the package is a module
        if theirs in {"__version__", ""}:
            continue
        assert theirs in ORDER, f"{where}: imports {theirs}, which has no place in the order"
        assert ORDER.index(theirs) < ORDER.index(mine), f"{where}: {mine} imports {theirs}, which comes after it"
        if mine == "suite":
            assert theirs in SUITE_MAY_IMPORT, (
                f"{where}: suite imports {theirs}; it may import {sorted(SUITE_MAY_IMPORT)}"
            )
        if theirs == "suite":
            assert mine in MAY_IMPORT_SUITE, f"{where}: {mine} imports suite; {sorted(MAY_IMPORT_SUITE)} may"


def test_the_reader_of_imports_sees_them(tmp_path, monkeypatch):
    """A test of the test: forms that an import takes."""
    package = tmp_path / "checkpoints"
    package.mkdir()
    (package / "odd.py").write_text(
        "from typing import TYPE_CHECKING\nimport xloom.model\nfrom xloom import cache, errors\nfrom ..hub import x\n"
        "from . import saved\nif TYPE_CHECKING:\n    from xloom.cli import y\ndef f():\n    from xloom.trace import z\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    found = {part(name) for _, name in imported(package / "odd.py")}
    assert found == {"model", "cache", "errors", "hub", "checkpoints", "cli", "trace"}


def test_no_circles():
    """Not even of imports for types, or inside functions."""
    modules = {}
    for path in FILES:
        *parts, last = ["xloom", *path.relative_to(SOURCE).with_suffix("").parts]
        modules[".".join(parts if last == "__init__" else [*parts, last])] = path
    graph = {}
    for module, path in modules.items():
        names = [name for _, name in imported(path)]
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & set(modules)) - {module, "xloom"}
    graph["xloom"] = set()  # its public names, which are loaded when they are asked for
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_public_names_exist():
    assert set(xloom.__all__) <= set(dir(xloom))
    assert set(xloom.__all__) == set(xloom._HOMES)
    for name in xloom.__all__:
        assert getattr(xloom, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        xloom.nonsense


def heavy_after(statement: str) -> str:
    """Which heavy packages are there after it. Nothing may be said on stderr, not even by those packages."""
    code = (
        f"import sys\n{statement}\nprint(*[m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE.parent, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_xloom_is_light():
    assert heavy_after("import xloom, xloom.errors") == ""
    everything = (
        "import importlib.util as i, xloom; xloom.XLoraForCausalLM\nif i.find_spec('bitsandbytes'): import bitsandbytes"
    )
    assert "torch" in heavy_after(everything), "a test of the test"


def test_import_of_the_command_line_is_light():
    if not (SOURCE / "cli").exists() and not (SOURCE / "cli.py").exists():
        pytest.skip("xloom.cli is not written yet")
    if heavy_after("import xloom.cli; print(hasattr(xloom.cli, 'main'))").splitlines()[0] != "True":
        pytest.skip("xloom.cli has no main yet")
    assert heavy_after("import xloom.cli") == ""
