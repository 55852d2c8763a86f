"""Critics: estimates of what is still to be earned, for every token before it is drawn.

A head on the policy's trunk costs one forward pass for both, and the trunk learns from both losses; a critic with a
trunk of its own costs a second pass and leaves the policy alone. Either way the first values are exactly 0: a head with
random weights starts with errors many times the rewards (and wild gradients through the trunk).
"""

import copy
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ops.batching import token_rows
from mlx_ops.forward import Rows, check_projection, completion_hidden, completion_logits, project


class ValueHead(nn.Module):
    """A linear map of the trunk's output (…, D) to values (…), in float32; 0 at the start."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self.bias = mx.zeros((1,))

    def __call__(self, hidden: mx.array) -> mx.array:
        return hidden.astype(mx.float32) @ self.weight + self.bias


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one backward pass serves both. The policy alone is what is published.

    `value[t]` is of the state before completion token t.
    """

    policy: nn.Module
    critic: nn.Module

    def logits_and_values(self, rows: Rows, *, trains_policy: bool = True) -> tuple[mx.array, mx.array]:
        """(B, T, V) and (B, T); without `trains_policy` no gradient reaches the policy."""
        raise NotImplementedError

    def estimate(self, rows: Rows) -> mx.array:
        """The values (B, T)."""
        raise NotImplementedError


class SharedTrunk(ActorCritic):
    """A value head on the policy's trunk. `ValueError` for a policy that does more than project after its trunk."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        check_projection(policy)
        self.policy, self.critic = policy, ValueHead(hidden_size(policy))

    def logits_and_values(self, rows: Rows, *, trains_policy: bool = True) -> tuple[mx.array, mx.array]:
        hidden = completion_hidden(self.policy, rows)
        hidden = hidden if trains_policy else mx.stop_gradient(hidden)
        logits = project(self.policy, hidden)
        return logits if trains_policy else mx.stop_gradient(logits), self.critic(hidden)

    def estimate(self, rows: Rows) -> mx.array:
        return self.critic(completion_hidden(self.policy, rows))


class Critic(nn.Module):
    """A model of its own with a value head in place of its language-model head."""

    def __init__(self, start: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = twin(start)
        self.head = ValueHead(hidden_size(start))
        if "lm_head" in self.backbone:
            self.backbone.lm_head.freeze()

    def __call__(self, rows: Rows) -> mx.array:
        return self.head(completion_hidden(self.backbone, rows))


class TwoTrunks(ActorCritic):
    """A critic beside the policy, with the policy's start (and its adapters, where it has some) as its own."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.critic = policy, Critic(policy)

    def logits_and_values(self, rows: Rows, *, trains_policy: bool = True) -> tuple[mx.array, mx.array]:
        logits = completion_logits(self.policy, rows)
        return logits if trains_policy else mx.stop_gradient(logits), self.critic(rows)

    def estimate(self, rows: Rows) -> mx.array:
        return self.critic(rows)


def actor_critic(policy: nn.Module, kind: Literal["head", "separate"]) -> ActorCritic:
    """The policy with a critic whose values are 0."""
    return SharedTrunk(policy) if kind == "head" else TwoTrunks(policy)


def hidden_size(model: nn.Module) -> int:
    """The width of the trunk's output; nothing is computed."""
    return completion_hidden(model, token_rows([[0]], [[0]])).shape[-1]


def twin(model: nn.Module) -> nn.Module:
    """A second module over the same arrays: it takes no memory until one of the two moves."""
    shared = {id(array): array for _, array in tree_flatten(model.parameters())}
    return copy.deepcopy(model, shared)
