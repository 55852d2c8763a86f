"""Algorithms of reinforcement learning: what each is given, what they share, and the registry that names them.

One is a file and a registration: a `PolicyTrainer` that says where a step's minibatches come from and what their loss
is. `docs/algorithms.md` writes REINFORCE.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import BaseModel

from configs.registry import Registry
from configs.schema import PluginPolicyConfig, PolicyConfig
from mlx_ops.batching import TokenRows, Tree
from mlx_ops.distributed import ALONE, Ranks
from mlx_ops.forward import score, unshared_because
from mlx_ops.policy import PolicyBatch, Reference, Row, StepTotals, evaluate_rows, microbatches
from mlx_ops.policy_loss import ROW_GAP
from mlx_ops.rollout import Group
from mlx_ops.trainer import BaseTrainer, Limits, Metrics
from rewards.base import NoOptions

Config = TypeVar("Config", bound=PolicyConfig)
Draw = Callable[[int, int], tuple[list[Group], dict[str, float]]]
"""(position in the data, prompts) -> judged groups, seconds."""
KeepSamples = Callable[[list[Mapping[str, Any]]], None]
REFERENCE = "reference."


class PolicyTrainer(BaseTrainer[PolicyBatch], Generic[Config]):
    """Trains a policy on judged rollouts; a subclass writes `collect` and `loss`.

    `Options` is the pydantic model of a plugin's own settings; the trainer holds them as `self.options`.
    """

    Options: ClassVar[type[BaseModel]] = NoOptions

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: Config,
        *,
        draw: Draw,
        weights: Mapping[str, float],
        token_budget: int,
        seed: int,
        keep: KeepSamples,
        ranks: Ranks = ALONE,
    ) -> None:
        """`draw` gives judged groups, `weights` are those of the rewards, `keep` receives each step's samples."""
        limits = Limits(config.optimizer.max_grad_norm, config.max_nonfinite_steps)
        super().__init__(model, optimizer, seed=seed, limits=limits, ranks=ranks)
        self.compiled = self.compiled and config.compile_update
        # Asked once a process, by running the model: in the first step that would use up random numbers of its dropout.
        unshared_because(model)
        self.policy, self.config = model, config
        self.draw, self.weights, self.token_budget, self.keep = draw, weights, token_budget, keep
        self.options: Any = self.Options.model_validate(options_of(config))
        self.reference = Reference(model) if config.kl_coef > 0 else None
        self.position = 0
        self.gaps: dict[int, float] = {}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "position": self.position}

    def arrays(self) -> dict[str, mx.array]:
        """The reference, where it isn't the start of the run any more."""
        if self.reference is None or self.config.ref_refresh_every is None:
            return {}
        return named(REFERENCE, self.reference.weights)

    def restore(self, step: int, state: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> None:
        super().restore(step, state, arrays)
        self.position = int(state["position"])
        kept = tree_below(arrays, REFERENCE)
        if self.reference is not None and kept:
            self.reference.weights = kept

    @property
    def task_reward(self) -> str:
        """The first reward that counts: the raw task metric, which groups are filtered on."""
        return next(name for name, weight in self.weights.items() if weight)

    def rollouts(self, prompts: int) -> tuple[list[Group], Metrics]:
        """The next groups of judged rollouts and the seconds they took; the position in the data moves on."""
        groups, seconds = self.draw(self.position, prompts)
        self.position += prompts
        return groups, seconds

    def scored(self, rows: Sequence[Row], *, old: bool) -> tuple[list[Row], Metrics]:
        """The rows with the log-probabilities of the policy as it is (where `old`) and of the reference; seconds."""
        started = time.perf_counter()
        kept = list(rows)
        if old:
            kept = [replace(row, old_logprobs=own) for row, own in zip(kept, self._score(kept), strict=True)]
        between = time.perf_counter()
        if self.reference is not None:
            with self.reference.in_place_of(self.policy):
                found = self._score(kept)
            kept = [replace(row, ref_logprobs=ref) for row, ref in zip(kept, found, strict=True)]
        done = time.perf_counter()
        return kept, {"seconds/old_logprobs": between - started, "seconds/ref_logprobs": done - between}

    def _score(self, rows: Sequence[Row]) -> list[Any]:
        def logprobs(batch: TokenRows) -> mx.array:
            return score(self.policy, batch, temperature=self.config.sampling.temperature)[0]

        return self.evaluated(rows, logprobs)

    def evaluated(self, rows: Sequence[Row], function: Callable[[TokenRows], mx.array]) -> list[np.ndarray]:
        """`evaluate_rows` of all rows, each rank computing its share."""
        found = evaluate_rows(function, self._share(rows), self.token_budget)
        return [np.asarray(values, dtype=np.float32) for values in self.ranks.gather(found)]

    def _share(self, rows: Sequence[Row]) -> Sequence[Row]:
        return self.ranks.share(rows, [len(row.tokens) for row in rows])

    def minibatch(self, rows: Sequence[Row], totals: StepTotals) -> list[PolicyBatch]:
        """This rank's share of the rows of one optimizer step as microbatches; `totals` are the step's denominators."""
        return microbatches(
            self._share(rows),
            totals,
            aggregation=self.config.aggregation,
            max_tokens=self.config.sampling.max_tokens,
            token_budget=self.token_budget,
            bucket=self.bucket,
        )

    def played(
        self, minibatches: Iterable[Sequence[PolicyBatch]], samples: Sequence[Mapping[str, Any]], step: int
    ) -> Iterator[Sequence[PolicyBatch]]:
        """The minibatches one by one; after the last update the samples are kept and the reference follows if due."""
        self.gaps.clear()
        for minibatch in minibatches:
            # Layers with kernels of their own take the path that has a gradient.
            self.model.train()
            yield minibatch
            self.model.eval()
        gaps = dict(self.ranks.gather(list(self.gaps.items())))
        self.keep([{**row, "logprob_difference": gaps.get(place)} for place, row in enumerate(samples)])
        every = self.config.ref_refresh_every
        if self.reference is not None and every is not None and (step + 1) % every == 0:
            self.reference.refresh(self.policy)

    def observe(self, batch: PolicyBatch, extra: Mapping[str, mx.array]) -> None:
        """Remember how far sampler and trainer are apart on each rollout."""
        if ROW_GAP in extra:
            self.gaps |= zip(np.array(batch.places).tolist(), np.array(extra[ROW_GAP]).tolist(), strict=True)


AlgorithmRegistry: Registry[PolicyTrainer[Any]] = Registry("algorithm")


def options_of(config: PolicyConfig) -> dict[str, Any]:
    """The options of a plugin's section; the sections of our own algorithms have none."""
    return config.options if isinstance(config, PluginPolicyConfig) else {}


def named(prefix: str, tree: Tree) -> dict[str, mx.array]:
    """The arrays of a tree by their dotted names, under a prefix."""
    return {prefix + name: cast(mx.array, array) for name, array in tree_flatten(tree)}


def tree_below(arrays: Mapping[str, mx.array], prefix: str) -> Tree:
    """The tree of the arrays whose names begin with `prefix`; empty where none does."""
    kept = [(name.removeprefix(prefix), array) for name, array in arrays.items() if name.startswith(prefix)]
    return cast(Tree, tree_unflatten(kept)) if kept else {}
