"""Optimizers of mlx.optimizers and their learning-rate schedules, from the configuration; and the step they make."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from configs.schema import OptimizerConfig
from mlx_ops.backend import prepare
from mlx_ops.batching import Tree

Schedule = Callable[[mx.array], mx.array]


def make_optimizer(config: OptimizerConfig, learning_rate: float, updates: int) -> optim.Optimizer:
    """The optimizer for a run of `updates` optimizer steps; gradients are clipped by the trainer, not here."""
    rate = make_schedule(config, learning_rate, updates)
    if config.kind == "lion":
        betas = [config.beta1, min(config.beta2, 0.99)]
        return optim.Lion(rate, betas=betas, weight_decay=config.weight_decay)
    if config.kind == "adafactor":
        return optim.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=config.weight_decay)
    betas = [config.beta1, config.beta2]
    # Without the bias correction of arXiv:1412.6980 the first steps of Adam would be up to three times too large.
    return optim.AdamW(rate, betas=betas, eps=config.eps, weight_decay=config.weight_decay, bias_correction=True)


def make_schedule(config: OptimizerConfig, learning_rate: float, updates: int) -> Schedule:
    """The learning rate of update 0, 1, …: a linear warm-up from its first fraction, then the configured shape."""
    return partial(_rate, config=config, peak=learning_rate, updates=updates)


def _rate(step: mx.array, *, config: OptimizerConfig, peak: float, updates: int) -> mx.array:
    warm, floor = config.warmup_steps, config.final_fraction
    done = step.astype(mx.float32)
    warming = mx.minimum((done + 1) / max(warm + 1, 1), 1.0)
    progress = mx.clip((done - warm) / max(updates - warm, 1), 0.0, 1.0)
    if config.schedule == "constant":
        decay = mx.array(1.0)
    elif config.schedule == "linear":
        decay = 1.0 - (1.0 - floor) * progress
    else:
        decay = floor + (1.0 - floor) * 0.5 * (1.0 + mx.cos(math.pi * progress))
    return peak * warming * decay


@dataclass(frozen=True)
class Move:
    """A step of an optimizer that is built and not yet made, or evaluated."""

    model: nn.Module
    optimizer: optim.Optimizer
    weights: Tree
    state: Tree

    def make(self) -> None:
        """The model and the optimizer go on from here."""
        self.model.update(self.weights)
        self.optimizer.state = self.state


class ClippedStep:
    """Moves a model by gradients scaled down to `max_norm` where they exceed it.

    AdamW is a dozen passes over weights and moments; compiled, where the backend fuses, it is one. Weights have one
    shape, so it is traced once.
    """

    def __init__(self, optimizer: optim.Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self._moved = mx.compile(self._move) if prepare().compiles else self._move

    def __call__(self, model: nn.Module, grads: Tree, norm: mx.array) -> Move:
        """The step; `norm` is that of `grads`."""
        weights = cast(Tree, model.trainable_parameters())
        # Moments that came with the first step would be another shape of state, and a second trace.
        self.optimizer.init(weights)
        before = self.optimizer.state
        weights, state = self._moved(weights, before, grads, norm)
        self.optimizer.state = before
        return Move(model, self.optimizer, weights, state)

    def _move(self, weights: Tree, state: Tree, grads: Tree, norm: mx.array) -> tuple[Tree, Tree]:
        # The optimizer changes the dicts that it is given.
        self.optimizer.state = tree_map(lambda array: array, state)
        # A matrix' gradient comes transposed: beside the weights each of its numbers would be a memory access.
        straight = tree_map(mx.contiguous, grads)
        moved = self.optimizer.apply_gradients(clipped(straight, norm, self.max_norm), weights)
        return moved, cast(Tree, self.optimizer.state)


def global_norm(grads: Tree) -> mx.array:
    """The norm of all gradients together, in float32."""
    squares = [mx.sum(mx.square(cast(mx.array, g).astype(mx.float32))) for _, g in tree_flatten(grads)]
    # A sum of scalars is a few kernels where it is compiled; a stack of them is one for each.
    return mx.sqrt(sum(squares[1:], squares[0]))


def clipped(grads: Tree, norm: mx.array, limit: float) -> Tree:
    """Gradients of this norm, scaled down to `limit` where they exceed it."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: (g * scale).astype(g.dtype), grads)
