"""The rules of the house that a reader can't see in one file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.loader import EXPERIMENTS, load_experiment

ROOT = Path(__file__).parents[1]
ORDER = ("configs", "rewards", "mlx_ops", "pipeline")
"""Each package may import those before it."""
OUTSIDE = {
    "dagster": {"pipeline"},
    "wandb": {"pipeline"},
    "mlx": {"mlx_ops", "pipeline"},
    "mlx_lm": {"mlx_ops", "pipeline"},
}
"""Packages of others that only these of ours may import."""
HEAVY = ("mlx", "mlx_lm", "mlx_ops", "datasets", "transformers", "wandb", "matplotlib", "pandas", "reasoning_gym")
LONGEST = 60
"""Lines that a function stays under."""
IMPORTS_HEAVY_PACKAGES_AT_ITS_TOP = {f"pipeline/{name}.py" for name in ("job", "ranks", "train", "trainers", "worker")}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The first parts of the names that code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0] if node.level == 0 else "(relative)"


def at_import(tree: ast.AST) -> Iterator[str]:
    """What a module imports when it is imported: not within functions, nor for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if types_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        else:
            yield from at_import(node)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    above = set(ORDER[ORDER.index(package) + 1 :])
    faults = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(parse(path))
        if name in above
    ]
    assert faults == []


@pytest.mark.parametrize("package", ORDER)
def test_packages_of_others_stay_where_they_belong(package):
    banned = {name for name, allowed in OUTSIDE.items() if package not in allowed}
    faults = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(parse(path))
        if name in banned
    ]
    assert faults == []


@pytest.mark.parametrize("package", ORDER)
def test_imports_are_absolute(package):
    alone = ROOT / "rewards" / "isolated"  # copied into a sandbox, where there is no package of ours
    files = [path for path in modules(package) if alone not in path.parents]
    assert [str(path) for path in files if "(relative)" in imported(parse(path))] == []


def test_what_dagster_loads_imports_heavy_packages_in_functions_only():
    faults = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("pipeline")
        if str(path.relative_to(ROOT)) not in IMPORTS_HEAVY_PACKAGES_AT_ITS_TOP
        for name in at_import(parse(path))
        if name in HEAVY
    ]
    assert faults == []


def test_dagsters_config_can_resolve_its_annotations():
    postponed = "from __future__ import annotations"
    assert [str(path) for path in modules("pipeline") if postponed in path.read_text(encoding="utf-8")] == []


def test_environment_variables_are_read_in_one_place():
    hands_its_own_to_a_child = {"data/reasoning.py", "launch.py"}
    folder = ROOT / "pipeline"
    readers = {str(path.relative_to(folder)) for path in modules("pipeline") if "os.environ" in path.read_text("utf-8")}
    assert readers - hands_its_own_to_a_child == {"definitions.py", "worker.py"}, "each is where a process begins"


def test_nothing_that_computes_catches_an_exception():
    catching = {
        path.name for path in modules("mlx_ops") if any(isinstance(n, ast.ExceptHandler) for n in ast.walk(parse(path)))
    }
    assert catching == set()


@pytest.mark.parametrize("package", ORDER)
def test_functions_stay_short(package):
    functions = (
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)} {node.name}")
        for path in modules(package)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    assert [found for found in functions if found[0] >= LONGEST] == []


def test_there_is_no_module_for_everything_else():
    names = {path.stem for package in ORDER for path in modules(package)}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc"})


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
import dagster as dg
from pipeline.definitions import defs
dg.Definitions.validate_loadable(defs())
"""


def test_the_definitions_load_where_no_heavy_package_can_be_imported():
    script = BLOCKED.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_experiment_loads():
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert {load_experiment(file).name for file in files} == {file.stem for file in files}
    assert "quickstart" in {file.stem for file in files}
