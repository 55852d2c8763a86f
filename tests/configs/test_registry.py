import importlib.metadata
import sys

import pytest

from configs.registry import ENTRY_POINT_GROUP, PluginFault, Registry, import_source, load_plugins


class Animal:
    pass


class Cat(Animal):
    pass


class Dog(Animal):
    pass


def animals() -> Registry[Animal]:
    registry: Registry[Animal] = Registry("animal")
    registry.register("cat")(Cat)
    return registry


def test_a_registered_class_is_found_under_its_name():
    registry = animals()
    assert registry["cat"] is Cat
    assert "cat" in registry
    assert "dog" not in registry
    registry.register("ant")(Dog)
    assert registry.names() == ["ant", "cat"]


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(KeyError, match=r"unknown animal 'cow'; registered: \['cat'\]"):
        animals()["cow"]


def test_a_taken_name_is_refused_and_keeps_its_class():
    registry = animals()
    with pytest.raises(ValueError, match=r"animal 'cat' is taken by tests\.configs\.test_registry\.Cat"):
        registry.register("cat")(Dog)
    assert registry["cat"] is Cat


def test_the_same_class_may_be_registered_again():
    registry = animals()
    registry.register("cat")(type("Cat", (Animal,), {"__module__": Cat.__module__}))
    assert registry["cat"] is not Cat


def test_a_plugin_file_is_imported_once_and_relative_to_the_root(tmp_path):
    (tmp_path / "mine.py").write_text("TIMES = []\nTIMES.append(1)\n", encoding="utf-8")
    first = import_source("./mine.py", tmp_path)
    assert import_source(str(tmp_path / "mine.py"), tmp_path / "elsewhere") is first
    assert vars(first)["TIMES"] == [1]


def test_files_of_one_name_and_paths_that_differ_in_separators_only_are_plugins_of_their_own(tmp_path):
    sources = ["b.py", "a/b.py", "a_b.py"]
    for source in sources:
        (tmp_path / source).parent.mkdir(exist_ok=True)
        (tmp_path / source).write_text(f"WHERE = {source!r}\n", encoding="utf-8")
    assert [vars(import_source(source, tmp_path))["WHERE"] for source in sources] == sources


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("gone.py", None, "FileNotFoundError: no such file"),
        ("no_such_package_here.rewards", None, "ModuleNotFoundError: No module named"),
        ("bad.py", "def f(:\n", "SyntaxError"),
        ("bad.py", "1 / 0\n", "ZeroDivisionError: division by zero"),
        ("bad.py", "import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("bad.py", "class Odd(Exception):\n    pass\nraise Odd('why')\n", "Odd: why"),
        ("", None, "ValueError"),
    ],
)
def test_a_plugin_that_fails_to_import_is_named_with_its_reason(tmp_path, source, code, said):
    if code is not None:
        (tmp_path / source).write_text(code, encoding="utf-8")
    with pytest.raises(ImportError, match=f"plugin '{source}' fails to import: .*{said}"):
        load_plugins([source], tmp_path)


def test_a_plugin_that_failed_is_tried_again(tmp_path):
    (tmp_path / "late.py").write_text("raise RuntimeError\n", encoding="utf-8")
    with pytest.raises(ImportError):
        load_plugins(["late.py"], tmp_path)
    (tmp_path / "late.py").write_text("READY = True\n", encoding="utf-8")
    load_plugins(["late.py"], tmp_path)
    assert vars(import_source("late.py", tmp_path))["READY"]


def test_an_entry_point_is_imported_only_when_it_is_named(tmp_path, monkeypatch):
    package = tmp_path / "their_package-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1\n", encoding="utf-8")
    (package / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\ntheirs = their_package_rewards\n", encoding="utf-8"
    )
    (tmp_path / "their_package_rewards.py").write_text("HERE = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="theirs")
    load_plugins([], tmp_path)
    assert "their_package_rewards" not in sys.modules
    load_plugins(["theirs"], tmp_path)
    assert sys.modules.pop("their_package_rewards").HERE


def test_an_interrupt_passes_through_a_plugin():
    with pytest.raises(KeyboardInterrupt), PluginFault(ValueError, "never said"):
        raise KeyboardInterrupt
