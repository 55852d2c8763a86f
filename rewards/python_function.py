"""A plain function as a reward: what works as a reward function in TRL works here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field

from configs.registry import PluginFault, import_source
from configs.schema import Strict
from rewards.base import BaseReward, RewardRegistry


class PythonFunctionOptions(Strict):
    function: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_][A-Za-z0-9_]*$")]
    """`package.module:name`, or `./file.py:name` relative to the folder that the command runs in."""
    arguments: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Keyword arguments of every call, beside the dataset's columns."""


@RewardRegistry.register("python")
class PythonFunction(BaseReward):
    """What `function(prompts=…, completions=…, **columns, **arguments)` returns: a float or None a completion."""

    Options: ClassVar = PythonFunctionOptions
    options: PythonFunctionOptions

    def __init__(self, options: PythonFunctionOptions) -> None:
        super().__init__(options)
        self._function = load_function(options.function)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        with PluginFault(ValueError, f"function {self.options.function!r}"):
            arguments = {**columns, **self.options.arguments}
            return self._function(prompts=prompts, completions=completions, **arguments)


def load_function(reference: str) -> Callable[..., Sequence[float | None]]:
    """The function behind `module:name` or `file.py:name`; `ValueError` names what is missing."""
    source, _, name = reference.rpartition(":")
    with PluginFault(ValueError, f"function {reference!r} can't be loaded"):
        function = getattr(import_source(source, Path.cwd()), name)
    if not callable(function):
        raise ValueError(f"function {reference!r}: expected a function, got {type(function).__name__}")
    return cast(Callable[..., Sequence[float | None]], function)
