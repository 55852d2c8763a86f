"""The reward for a right mathematical expression, by the package math-verify (the extra `math`).

Sympy can compute for ever, holding the interpreter's lock, so no thread and no timer ends it. All of it happens in a
child process that is killed when it takes too long. That is no sandbox: the child has the user's rights, without the
environment; math-verify parses by a grammar and runs no code of the completion.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

from pydantic import PositiveFloat

from configs.schema import Strict
from rewards.base import BaseReward, Example, RewardRegistry
from rewards.columns import column, gold

START_SECONDS = 60.0
MEMORY_BYTES = 4 << 30
CHILD = f"""
import json, logging, resource, sys
try:
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
except (ValueError, OSError):
    pass  # macOS
from math_verify import parse, verify
logging.disable()
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    gold, text = json.loads(line)
    expected = parse("\\\\boxed{{" + gold + "}}", parsing_timeout=None)
    found = parse(text, parsing_timeout=None)
    print(json.dumps([bool(expected), bool(verify(expected, found, timeout_seconds=None))]), flush=True)
"""


class MathVerifyOptions(Strict):
    correct: float = 1.0
    incorrect: float = 0.0
    timeout_seconds: PositiveFloat = 5.0
    """Of one completion; one that takes longer is incorrect."""


@RewardRegistry.register("math_verify")
class MathVerify(BaseReward):
    """`correct` where math-verify finds the completion's answer equal to the example's, else `incorrect`."""

    Options: ClassVar = MathVerifyOptions
    options: MathVerifyOptions

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        ids = columns.get("id", range(len(prompts)))
        with Verifier(self.options.timeout_seconds) as verifier:
            return [
                self.options.correct
                if verifier.compare(gold(example, answer), answering_part(text))[1]
                else self.options.incorrect
                for example, answer, text in zip(ids, column(columns, "answer"), completions, strict=True)
            ]

    def validate(self, examples: Sequence[Example]) -> None:
        """`ValueError` for an answer that math-verify can't read, or that isn't equal to itself."""
        with Verifier(self.options.timeout_seconds) as verifier:
            for example in examples:
                answer = gold(example.id, example.answer)
                if verifier.compare(answer, f"\\boxed{{{answer}}}") != (True, True):
                    raise ValueError(f"example {example.id!r}: math-verify can't read the answer {answer!r}")


def answering_part(text: str) -> str:
    """What follows the last thought; nothing while one is open."""
    rest = text.rpartition("</think>")[2]
    return "" if "<think>" in rest else rest


class Verifier:
    """A child process with math-verify in it, made anew after each text that it does not survive."""

    def __init__(self, timeout_seconds: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError("math_verify needs the package math-verify: pip install 'mlx-rl-trainer[math]'")
        self._timeout = timeout_seconds
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    def compare(self, reference: str, text: str) -> tuple[bool, bool]:
        """Whether the reference could be read, and whether the text's answer equals it; neither where time ran out."""
        if self._child is None:
            self._start()
        assert self._child is not None
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps([reference, text]).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass
        reply = self._reply(self._timeout)
        if reply is None:
            self._end()
            return False, False
        return reply[0], reply[1]

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath},
        )
        if self._reply(START_SECONDS) != "ready":
            self._end()
            raise RuntimeError("math-verify does not start: try `python -c 'import math_verify'`")

    def _reply(self, seconds: float) -> Any:
        """The child's next line, or None where none comes in time or it has ended."""
        assert self._child is not None
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        line = self._child.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
