"""What the evaluation tests share: a small real tokenizer, and a generator that says what it is told to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from configs.schema import EvaluationConfig, PromptConfig, RewardConfig, SamplingConfig
from mlx_ops.batching import Completion
from mlx_ops.model import train_tokenizer
from pipeline.evaluation.base import EvaluationContext
from pipeline.evaluation.report import DatasetInfo
from rewards.base import Example

SHARED = Path(__file__).parents[3] / "shared"
CORPUS = ["Question: What is 3 + 4? Answer: The answer is 7.\n#### 7", "def add(a, b):\n    return a + b\n"]


@cache
def tokenizer() -> TokenizerWrapper:
    return TokenizerWrapper(train_tokenizer(CORPUS, 400))


@dataclass(frozen=True)
class Speaker:
    """Stands where a policy stands: `model` is the function that answers a prompt's text, given the row's seed."""

    model: Callable[[str, int], str]
    tokenizer: TokenizerWrapper
    path: Path


def speak(
    model: Callable[[str, int], str],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    eos: frozenset[int],
    group_size: int,
    stop: Any,
    max_rows: int | None,
    progress: Any,
) -> list[Completion]:
    """Keeps the engine's contract: an end token is kept, a stop string ends a row, the limit cuts it."""
    ids = tokenizer()
    completions = []
    for row, seed in enumerate(seeds):
        text = model(ids.decode(list(prompts[row // group_size])), seed)
        tokens = [*ids.encode(text, add_special_tokens=False), ids.eos_token_id]
        kept = None if stop is None else stop(row, tokens, 0)
        whole = tokens[: len(tokens) if kept is None else kept]
        drawn = tuple(whole[: sampling.max_tokens])
        completions.append(Completion(drawn, (0.0,) * len(drawn), len(whole) > sampling.max_tokens))
    return completions


def speaker(answer: Callable[[str, int], str] | str, path: Path) -> Speaker:
    return Speaker(answer if callable(answer) else lambda prompt, seed: answer, tokenizer(), path)


def context(
    test: Sequence[Example] = (),
    train: Sequence[Example] = (),
    rewards: tuple[RewardConfig, ...] = (),
    prompt: PromptConfig | None = None,
    seed: int = 0,
    stage: str = "grpo",
) -> EvaluationContext:
    return EvaluationContext(
        experiment="trial",
        stage=stage,
        seed=seed,
        prompt=prompt or PromptConfig(),
        checkpoint=f"trial/{stage}",
        checkpoint_sha256="0" * 64,
        step=7,
        dataset=DatasetInfo(name="sums", split="test", sha256="1" * 64),
        test=test,
        train=train,
        rewards=rewards,
    )


def config(benchmark: str, **fields: Any) -> EvaluationConfig:
    sampling = SamplingConfig(temperature=fields.pop("temperature", 0.0), max_tokens=fields.pop("max_tokens", 200))
    return EvaluationConfig(benchmark=benchmark, sampling=sampling, **fields)


def sums(count: int) -> list[Example]:
    """`What is 3 + i?`, with the sum as the answer."""
    return [Example(f"sum-{i}", f"What is 3 + {i}?", answer=str(3 + i)) for i in range(count)]
