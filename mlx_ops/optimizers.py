"""Optimizers of mlx.optimizers and their learning-rate schedules, from the configuration."""

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim

from configs.schema import OptimizerConfig

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
