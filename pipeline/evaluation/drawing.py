"""Problems become completions: tokens, seeds, the engine, text again.

A row's draw depends on the evaluation's seed, the item's id and the sample's number: not on order, batch size or limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from configs.schema import EvaluationConfig, SamplingConfig
from pipeline.evaluation.base import Output, Problem
from pipeline.evaluation.report import Finish

Progress = Callable[[int, int], None]
"""(rows finished so far, tokens drawn so far)."""
TAIL = 4
"""Tokens of the prompt that a completion is decoded behind."""


class Drawn(Protocol):
    """What the engine gives for a row: `mlx_ops.batching.Completion`."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def truncated(self) -> bool: ...


class Generate(Protocol):
    """`mlx_ops.generation.generate`, or anything that keeps its contract."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        eos: frozenset[int],
        group_size: int,
        stop: Any,
        max_rows: int | None,
        progress: Progress | None,
    ) -> Sequence[Drawn]: ...


class HasModel(Protocol):
    """`mlx_ops.model.Policy`, or what stands in for it."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Drawing:
    """Prompts and completions of all problems, in their order."""

    prompts: list[tuple[int, ...]]
    outputs: list[list[Output]]

    @property
    def rows(self) -> list[Output]:
        return [output for samples in self.outputs for output in samples]


def draw(
    policy: HasModel,
    problems: Sequence[Problem],
    evaluation: EvaluationConfig,
    *,
    seed: int,
    stop: Sequence[str],
    generate: Generate,
    progress: Progress | None = None,
) -> Drawing:
    """`evaluation.samples` completions of each problem, ended by an end token, a stop string or the token limit."""
    tokenizer = policy.tokenizer
    prompts = [render(problem, tokenizer) for problem in problems]
    # Long prompts first: rows of one batch are of like length, and memory that doesn't suffice shows at once.
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    eos = end_tokens(tokenizer, stop)
    drawn = generate(
        policy.model,
        [prompts[place] for place in order],
        sampling=evaluation.sampling,
        seeds=row_seeds(seed, [problems[place].id for place in order], evaluation.samples),
        eos=eos,
        group_size=evaluation.samples,
        stop=_engine_stop(tokenizer, stop),
        max_rows=evaluation.batch_size,
        progress=progress,
    )
    outputs: list[list[Output]] = [[] for _ in problems]
    for row, completion in enumerate(drawn):
        place = order[row // evaluation.samples]
        outputs[place].append(_output(prompts[place], completion, tokenizer, eos, stop))
    return Drawing(prompts, outputs)


def render(problem: Problem, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of a problem's prompt; a chat template writes the special tokens, and none is added to it."""
    from mlx_ops.prompts import prompt_tokens

    tokens = prompt_tokens(problem.example, problem.prompt, tokenizer)
    prefix = tokenizer.encode(problem.prefix, add_special_tokens=False) if problem.prefix else []
    return (*tokens, *prefix)


def row_seeds(seed: int, ids: Sequence[str], samples: int) -> list[int]:
    """A seed for each sample of each item, in group order."""
    from mlx_ops.rollout import row_seed

    return [row_seed(seed, item, sample) for item in ids for sample in range(samples)]


def end_tokens(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """The model's end tokens, and those stop strings that are one special token: as text they never appear."""
    special = tokenizer.added_tokens_encoder
    return frozenset(tokenizer.eos_token_ids) | {special[string] for string in stop if string in special}


def _engine_stop(tokenizer: Any, stop: Sequence[str]) -> Any:
    if not stop:
        return None
    from mlx_ops.generation import StopStrings

    return StopStrings(lambda tokens: _decode(tokenizer, tokens), tuple(stop))


def _output(
    prompt: Sequence[int], completion: Drawn, tokenizer: Any, eos: frozenset[int], stop: Sequence[str]
) -> Output:
    tokens = completion.tokens
    ended = bool(tokens) and tokens[-1] in eos
    text = continuation_text(prompt, tokens[:-1] if ended else tokens, lambda ids: _decode(tokenizer, ids))
    shown = cut_at_stop(text, stop)
    finish: Finish = "stop" if len(shown) < len(text) else "length" if completion.truncated else "end"
    return Output(shown, finish, tokens)


def continuation_text(prompt: Sequence[int], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """The text that `tokens` add to the prompt.

    Decoded alone, SentencePiece tokenizers drop a leading space, and with it the indentation of code.
    """
    tail = list(prompt[-TAIL:])
    before, whole = decode(tail), decode([*tail, *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else decode(tokens)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((place for string in stop if (place := text.find(string)) >= 0), default=len(text))]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True)
