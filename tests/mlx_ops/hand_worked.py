"""Cases in the format of ``rl_vectors.json``, worked by hand: the oracle's numbers where the vectors are absent.

Two rows of up to three tokens. Every old log-probability is -1, so the ratios are 2, 1/2 and 1.1 in the first row and
1/2 in the second, whose padding is garbage that would show. The clip range is 0.1 below and 0.3 above.
"""

from math import exp, log
from typing import Any

THIRD = 1.1 ** (1 / 3)
"""The geometric mean of the first row's ratios."""

FIXTURES: dict[str, Any] = {
    "rows": {
        "group_size": 2,
        "lengths": [3, 1],
        "mask": [[1, 1, 1], [1, 0, 0]],
        "logp": [[-1 + log(2), -1 - log(2), -1 + log(1.1)], [-1 - log(2), -9.0, -7.0]],
        "old_logp": [[-1.0, -1.0, -1.0], [-1.0, -0.5, -31.0]],
        "ref_logp": [[-1 + log(4), -1 - log(2), -1 + log(1.1)], [-1 - log(4), -3.0, 2.0]],
        "rollout_logp": [[-1 - log(4), -1.0, -1.0], [-1 + log(2), -8.0, 0.0]],
        "entropy": [[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]],
        "advantages": [1.0, -1.0],
    },
    "groups": {
        "group_size": 4,
        "rewards": [1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5],
        "lengths": [1, 2, 3, 4, 1, 1, 1, 1],
    },
    "noise": {"group_size": 4, "rewards": [0.7, 0.7, 0.7, 0.70000006]},
    "values": {
        "mask": [[1, 1, 0], [1, 1, 1]],
        "mask_holes": [[1, 1, 0], [1, 0, 1]],
        "values": [[0.5, 0.25, 9.0], [0.5, 7.0, 0.25]],
        "vpreds": [[1.0, 0.3, 5.0], [0.0, 7.0, 0.25]],
        "token_level_scores": [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    },
}

CLIP = {"eps_low": 0.1, "eps_high": 0.3}
VERL_CLIP = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
DAPO = {"loss_type": "dapo", "num_items_in_batch": 4, **CLIP}


def _case(name: str, kind: str, fixture: str | None, params: dict[str, Any], **expected: Any) -> dict[str, Any]:
    return {"id": name, "kind": kind, "oracle": "hand", "fixture": fixture, "params": params, "expected": expected}


CASES = [
    # -1.3, -0.5, -1.1 | +0.9: the gain beyond 1.3 and the harm below 0.9 are clipped and have no gradient.
    _case("loss/token_mean", "grpo_loss", "rows", DAPO, loss=-0.5, grad_logp=[[0, -0.125, -0.275], [0, 0, 0]]),
    _case("loss/sequence_mean", "grpo_loss", "rows", {"loss_type": "grpo", **CLIP}, loss=(-2.9 / 3 + 0.9) / 2),
    _case("loss/dr_grpo", "grpo_loss", "rows", {"loss_type": "dr_grpo", "max_completion_length": 5, **CLIP}, loss=-0.2),
    # With the signs turned: 2, 0.9, 1.1 | -0.5, and 2 becomes 1.5 under the dual clip.
    _case("loss/turned", "grpo_loss", "rows", {**DAPO, "advantages": [-1.0, 1.0]}, loss=0.875),
    _case(
        "loss/dual_clip",
        "grpo_loss",
        "rows",
        {**DAPO, "advantages": [-1.0, 1.0], "delta": 1.5},
        loss=0.75,
        grad_logp=[[0, 0, 0.275], [-0.125, 0, 0]],
    ),
    _case("loss/gspo", "gspo_loss", "rows", CLIP, loss=(0.9 - THIRD) / 2, grad_logp=[[-THIRD / 6] * 3, [0, 0, 0]]),
    # -sg(min(r, 1.5)) A log p, over four tokens.
    _case(
        "loss/cispo",
        "grpo_loss",
        "rows",
        {"loss_type": "cispo", "eps_high": 1.5},
        loss=(-1.5 * (-1 + log(2)) - 0.5 * (-1 - log(2)) - 1.1 * (-1 + log(1.1)) + 0.5 * (-1 - log(2))) / 4,
        grad_logp=[[-0.375, -0.125, -0.275], [0.125, 0, 0]],
    ),
    _case(
        "loss/sapo",
        "grpo_loss",
        "rows",
        {"loss_type": "sapo"},
        loss=(-4 * (1 / (1 + exp(-1)) + 1 / (1 + exp(0.5)) + 1 / (1 + exp(-0.1))) / 3 + 4 / 1.05 / (1 + exp(0.525)))
        / 2,
    ),
    _case(
        "loss/verl/gpg/hand",
        "ppo_policy_loss",
        "rows",
        VERL_CLIP,
        loss=(1 - log(2) + 1 + log(2) + 1 - log(1.1) - 1 - log(2)) / 4,
        grad_logp=[[-0.25, -0.25, -0.25], [0.25, 0, 0]],
    ),
    # Log-ratios log 2, -log 2, log 1.1 against -0.1 and 0.3, pessimistic: 0.3, -log 2, log 1.1 | -0.1.
    _case(
        "loss/verl/geo_mean/hand",
        "ppo_policy_loss",
        "rows",
        VERL_CLIP,
        loss=(exp(-0.1) - exp((0.3 - log(2) + log(1.1)) / 3)) / 2,
    ),
    # k3 x ratio: 2 (2 - log 2 - 1), 0, 0 | 1/2 (1/2 + log 2 - 1); its gradient is ratio x (log p - log ref).
    _case(
        "loss/kl_unbiased",
        "grpo_loss",
        "rows",
        {**DAPO, "advantages": "zeros", "beta": 0.4},
        loss=0.1 * (2 * (1 - log(2)) + 0.5 * (log(2) - 0.5)),
        grad_logp=[[-0.2 * log(2), 0, 0], [0.05 * log(2), 0, 0]],
    ),
    _case("loss/entropy", "grpo_loss", "rows", {**DAPO, "entropy_coef": 0.5}, loss=-0.5 - 0.5 * 3),
    # Trainer over sampler: 4, 1, 1 | 1/2; as a product of the row 4 | 1/2.
    _case(
        "is/token_truncate",
        "importance_sampling",
        "rows",
        {"mode": "token_truncate", "clip_max": 3.0, "num_items_in_batch": 4, **CLIP},
        ratio=[[3, 1, 1], [0.5, 1, 1]],
        loss=(-3.9 - 0.5 - 1.1 + 0.45) / 4,
    ),
    _case(
        "is/sequence_mask",
        "importance_sampling",
        "rows",
        {"mode": "sequence_mask", "clip_max": 3.0, "num_items_in_batch": 4, **CLIP},
        ratio=[[0], [0.5]],
        loss=0.45 / 4,
    ),
    _case(
        "is/verl/sequence_0.6_5.0",
        "importance_sampling",
        "rows",
        {"level": "sequence", "threshold": "0.6_5.0"},
        weights=[[4, 4, 4], [0, 0, 0]],
    ),
    # Sampler - policy, the row's mean: (-3 log 2 + log 2 - log 1.1) / 3 | 2 log 2; only the second row has A < 0.
    _case(
        "loss/off_policy", "grpo_loss", "rows", {**DAPO, "off_policy_mask_threshold": 1.0}, loss=-2.9 / 4, keep=[1, 0]
    ),
    # Sampler over trainer: 1/4, 1, 1, their geometric mean 0.63 | 2. k3: 4 - 1 - log 4 = 1.6 | 1/2 - 1 + log 2 = 0.19.
    _case(
        "reject/mean",
        "rejection_mask",
        "rows",
        {"option": "seq_mean_k1", "threshold": "0.6_1.7"},
        mask=[[1, 1, 1], [0, 0, 0]],
    ),
    _case(
        "reject/max", "rejection_mask", "rows", {"option": "seq_max_k3", "threshold": "0.2"}, mask=[[0] * 3, [1, 0, 0]]
    ),
    _case(
        "reject/token", "rejection_mask", "rows", {"option": "token_k1", "threshold": 3}, mask=[[0, 1, 1], [1, 0, 0]]
    ),
    _case(
        "kl/k3",
        "kl",
        "rows",
        {"estimator": "k3"},
        per_token=[[1 - log(2), 0, 0], [log(2) - 0.5, 0, 0]],
        sum_over_mask=0.5,
        grad_logp_of_sum=[[-1, 0, 0], [0.5, 0, 0]],
    ),
    _case(
        "kl/k3+",
        "kl",
        "rows",
        {"estimator": "k3+"},
        grad_logp_of_sum=[[-log(2), 0, 0], [log(2), 0, 0]],
        sum_over_mask=0.5,
    ),
    _case("kl/k1", "kl", "rows", {"estimator": "k1"}, per_token=[[-log(2), 0, 0], [log(2), 0, 0]]),
    _case("kl/k2", "kl", "rows", {"estimator": "k2"}, sum_over_mask=log(2) ** 2),
    _case(
        "accumulated/dapo",
        "grpo_loss_accumulated",
        "rows",
        {**DAPO, "micro_batches": [[0, 1], [1, 2]]},
        micro_losses=[-2.9 / 4, 0.9 / 4],
        sum=-0.5,
        one_batch=-0.5,
    ),
    _case(
        "accumulated/grpo",
        "grpo_loss_accumulated",
        "rows",
        {"loss_type": "grpo", **CLIP, "micro_batches": [[0, 1], [1, 2]]},
        micro_losses=[-2.9 / 6, 0.45],
    ),
    # The first group: mean 1/4, squares 3/4, so std = sqrt(3/4 / 3) = 1/2. All eight: mean 3/8, std = sqrt(7/8 / 7).
    _case(
        "advantage/group",
        "group_advantage",
        "groups",
        {"scale_rewards": "group", "eps": 0.1},
        advantages=[1.25] + [-0.25 / 0.6] * 3 + [0.0] * 4,
    ),
    _case(
        "advantage/batch",
        "group_advantage",
        "groups",
        {"scale_rewards": "batch", "eps": 0.0},
        advantages=[0.75 * 8**0.5] + [-0.25 * 8**0.5] * 3 + [0.0] * 4,
    ),
    _case("advantage/noise", "group_advantage", "noise", {"scale_rewards": "group"}, advantages=[0.0] * 4),
    _case("adv/trl/rloo", "group_advantage", "groups", {}, advantages=[1.0] + [-1 / 3] * 3 + [0.0] * 4),
    _case(
        "advantage/two_rewards",
        "multi_reward_advantage",
        None,
        {
            "rewards_per_func": [[1.0, 4.0], [0.0, None], [0.0, 2.0], [0.0, 3.0]],
            "weights": [1.0, 0.5],
            "group_size": 4,
            "scale_rewards": "none",
            "aggregation": "sum_then_normalize",
        },
        advantages=[1.625, -1.375, -0.375, 0.125],
    ),
    # gamma = lambda = 1/2. Row 1: 1 - 0.25 and 0.125 - 0.5 + 0.75 / 4. Row 2 is the same across its hole.
    _case(
        "gae/holes",
        "gae",
        "values",
        {"gamma": 0.5, "lam": 0.5, "mask": "mask_holes"},
        raw_advantages_masked=[[-0.1875, 0.75, 0], [-0.1875, 0, 0.75]],
        returns_masked=[[0.3125, 1, 0], [0.3125, 0, 1]],
    ),
    # Errors over five tokens: 0.5 -> 0.3 within the range, 0.05, 0.5 -> 0.3, 6, 0; the larger square counts.
    _case(
        "value_loss/clip",
        "value_loss",
        "values",
        {"cliprange_value": 0.2},
        returns=[[1.5, 0.25, 0.0], [0.5, 1.0, 0.25]],
        loss=0.5 * (0.8**2 + 0.05**2 + 0.5**2 + 6**2 + 0) / 5,
        grad_vpreds=[[0, 0.01, 0], [-0.1, 1.2, 0]],
    ),
    _case(
        "kl/controller",
        "kl_controller",
        None,
        {"init": 1.0, "target": 2.0, "horizon": 10, "n_steps": 5, "current_kl": [2.2, 9.0, 0.0]},
        coef=[1.05, 1.155, 1.0395],
    ),
    _case(
        "reward/repetition",
        "reward",
        None,
        {"ngram": 2, "max_penalty": -1.0, "ids": [[5, 5, 5, 5, 5], [9]]},
        rewards=[-0.75, 0.0],
    ),
    _case(
        "reward/overlong",
        "reward",
        None,
        {"max_completion_len": 10, "soft_punish_cache": 4, "lengths": [6, 7, 10, 99]},
        rewards=[0.0, -0.25, -1.0, -1.0],
    ),
]
