"""A name in a configuration to a class: the one mechanism behind every kind of plugin."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
C = TypeVar("C")

ENTRY_POINT_GROUP = "mlx_rl_trainer.plugins"


class Registry(Generic[T]):
    """Classes by name. A taken name raises; an unknown one lists those there are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # Any: `register` gives each class back as its own type, which no annotation can tie to T.
        self._classes: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """A decorator that files the class under `name`; `ValueError` where the name is taken."""

        def decorate(cls: type[C]) -> type[C]:
            known = self._classes.get(name)
            # A plugin file that is loaded twice defines the same class again: that is no clash.
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is taken by {known.__module__}.{known.__qualname__}")
            self._classes[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise KeyError(f"unknown {self.kind} {name!r}; registered: {self.names()}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._classes)


class PluginFault:
    """A `with` block around a plugin's own code: whatever that raises leaves as `kind`, with `what` before its message.

    `what` may be a function, which is called only then. An interrupt passes through.
    """

    def __init__(self, kind: type[Exception], what: str | Callable[[], str]) -> None:
        self.kind, self.what = kind, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        # A plugin that calls sys.exit() would otherwise end the run without a word.
        if isinstance(error, Exception | SystemExit):
            what = self.what if isinstance(self.what, str) else self.what()
            raise self.kind(f"{what}: {type(error).__name__}: {error}") from error


def load_plugins(sources: Iterable[str], root: Path) -> None:
    """Import every plugin source; nothing that the sources don't name is imported.

    A source is a `.py` file relative to `root`, an entry point of the group `mlx_rl_trainer.plugins` that an installed
    package announces, or a module's dotted name. `ImportError` names the source; what the plugin raised is its cause.
    """
    for source in sources:
        with PluginFault(ImportError, f"plugin {source!r} fails to import"):
            import_source(source, root)


def import_source(source: str, root: Path) -> object:
    """What a plugin source names; a file is imported once, under a name made of its path."""
    if source.endswith(".py"):
        return _import_file((root / source).resolve())
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=source):
        return point.load()
    return importlib.import_module(source)


def _import_file(path: Path) -> object:
    name = f"plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
