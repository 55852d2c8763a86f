"""Which options of a case the oracle honours: one that it would ignore, or a value that it would misread, is refused.

An option that is None or False is off. Text with a blank in it, under a name that no option has, is a remark.
"""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def listed(value: Any) -> bool:
    return isinstance(value, list)


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def remark(value: Any) -> bool:
    return isinstance(value, str)


def one_of(*values: Any) -> Check:
    return lambda value: value in values


def rows_or(*names: str) -> Check:
    """Numbers of the case's own, one of the names, or a remark about the fixture's."""
    return lambda value: listed(value) or value in names or (remark(value) and " " in value)


MASK = one_of("padded", "truncated_masked", "tool", "mask", "mask_holes")
AGGREGATION = one_of("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
LEVEL, SCALE = one_of("token", "sequence"), one_of("group", "batch", "none")

ROWS: dict[str, Check] = {"mask": MASK, "advantages": rows_or("zeros"), "advantages_per_token": listed}
GRPO: dict[str, Check] = {
    **ROWS,
    "loss_type": one_of("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
    "eps_low": number,
    "eps_high": number,
    "delta": number,
    "beta": number,
    "use_bias_correction_kl": flag,
    "importance_sampling_level": LEVEL,
    "max_completion_length": number,
    "num_items_in_batch": number,
    "gradient_accumulation": one_of(1),
    "entropy_coef": number,
    "top_entropy_quantile": one_of(1.0),
    "off_policy_mask_threshold": number,
    "old_logp": remark,
    "sapo_temperature_pos": number,
    "sapo_temperature_neg": number,
    "uses": remark,
}
VERL: dict[str, Check] = {
    **ROWS,
    "loss_agg_mode": lambda value: remark(value) and AGGREGATION(value.split(" ")[0]),
    "loss_scale_factor": number,
    "clip_ratio_low": number,
    "clip_ratio_high": number,
    "clip_ratio_c": number,
    "log_ratio_clamp": one_of([-20, 20]),
    "tau_pos": number,
    "tau_neg": number,
}
SAMPLER: dict[str, Check] = {
    "mode": one_of("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "clip_min": number,
    "clip_max": number,
    "level": LEVEL,
    "threshold": lambda value: number(value) or remark(value),
    "loss": one_of("vanilla token-mean, eps 0.2/0.28, c=3"),
}
GROUP: dict[str, Check] = {
    "scale_rewards": SCALE,
    "eps": number,
    "std": remark,
    "normalize_advantages": flag,
    "beta": number,
    "reward_clip_range": listed,
    "norm_adv_by_std_in_grpo": flag,
    "gamma": number,
    "rewards": one_of("score on the last valid token"),
}
GAE: dict[str, Check] = {
    "gamma": number,
    "lam": number,
    "mask": MASK,
    "rewards": one_of("token_level_scores"),
    "kl_coef": number,
    "kl_estimator": one_of("k1", "k3"),
    "whiten_rewards": flag,
}

OPTIONS: dict[str, dict[str, Check]] = {
    "aggregation": {"loss_agg_mode": AGGREGATION, "loss_mat": remark, "mask": MASK, "loss_scale_factor": number},
    "gae": GAE,
    "group_advantage": GROUP,
    "group_advantage_tokens": GROUP,
    "grpo_loss": GRPO,
    "grpo_loss_accumulated": {**GRPO, "micro_batches": listed, "gradient_accumulation": number},
    "gspo_loss": {**GRPO, **VERL},
    "importance_sampling": {**GRPO, **SAMPLER},
    "kl": {"estimator": remark},
    "kl_controller": {"init": number, "target": number, "horizon": number, "n_steps": number, "current_kl": listed},
    "kl_grad": GRPO,
    "logits": {
        "temperature": number,
        "advantages": listed,
        "ref_logp": one_of("logp - 0.1 (constant)"),
        "beta": number,
        "kl": one_of("k3 * ratio"),
        "eps": listed,
        "entropy_coef": number,
        "aggregation": one_of("token mean"),
    },
    "masked_whiten": {"x": remark, "mask": MASK, "eps": one_of(1e-8), "var": one_of("unbiased")},
    "multi_reward_advantage": {
        "rewards_per_func": listed,
        "inf_means": remark,
        "weights": listed,
        "group_size": number,
        "scale_rewards": SCALE,
        "aggregation": one_of("sum_then_normalize", "normalize_then_sum"),
    },
    "ppo_advantages_trl": GAE,
    "ppo_policy_loss": VERL,
    "rejection_mask": {
        "option": one_of(
            *(f"token_k{k}" for k in (1, 2, 3)),
            *(f"seq_{how}_k{k}" for how in ("sum", "mean", "max") for k in (1, 2, 3)),
        ),
        "threshold": lambda value: number(value) or remark(value),
    },
    "requirement": {"rewards": listed, "dtype": remark},
    "reward": {},
    "sft_loss": {"mask": remark},
    "token_advantage": GROUP,
    "truncation_mask": {"mask_truncated_completions": one_of(True)},
    "value_loss": {"cliprange_value": number, "returns": remark, "mask": MASK, "agg": one_of("token-mean")},
}
"""For each kind: its options and what of their values is understood."""
OPEN = ("reward",)
"""Kinds whose cases name their numbers freely."""


def refuse_ignored(case: dict[str, Any]) -> None:
    """`NotImplementedError` names each option of the case that would be ignored, with its value."""
    kind = case["kind"]
    if kind in OPEN:
        return
    ignored = [f"{name}={value!r}" for name, value in case["params"].items() if not _known(OPTIONS[kind], name, value)]
    if ignored:
        raise NotImplementedError(f"{case['id']}: {', '.join(ignored)} of kind {kind!r} is not offered")


def _known(options: dict[str, Check], name: str, value: Any) -> bool:
    if value is None or value is False:
        return True
    return options[name](value) if name in options else remark(value) and " " in value
