"""Maps a case of ``rl_vectors.json`` onto our functions, so that other frameworks' numbers can be asked of them.

A case is ``{id, kind, oracle, fixture, params, expected}``; ``evaluate`` gives the numeric keys of ``expected``. What
we don't offer (VESPO, LUSPO, DPPO, top-entropy masks, |x| as KL, adaptive entropy, and every unknown kind) raises
NotImplementedError. Arrays are float64 on the CPU. MLX's float64 exp has float32 accuracy (4e-8 relative), so what
goes through it is held to float32's tolerance, and the rest to float64's.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import mlx_ops as mlx_ops  # before MLX, which binds its BLAS on import

# isort: split
import mlx.core as mx
import numpy as np

from mlx_ops import advantages as adv
from mlx_ops import corrections, losses
from mlx_ops import logprobs as lps
from rewards import shaping
from tests.oracle_options import refuse_ignored

DTYPE = mx.float64
FLOAT32, FLOAT64 = (2e-5, 2e-6), (1e-8, 1e-8)
"""Relative and absolute tolerance."""
WITHOUT_EXP = ("advantage", "aggregation", "gae", "kl_controller", "requirement", "reward", "value_loss", "whiten")

Case = dict[str, Any]
Values = dict[str, Any]
Lists = Any

KL_NAMES: dict[str, lps.KLEstimator] = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "k1": "k1", "k2": "k2", "k3": "k3"}
AGGREGATIONS: dict[str, losses.Aggregation] = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "sequence_sum",
    "token-sum": "token_sum",
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "dr_grpo": "dr_grpo",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
}
MASKS = {"padded": "mask", "truncated_masked": "mask_truncated_masked", "mask": "mask", "mask_holes": "mask_holes"}


def evaluate(case: Case, fixtures: dict[str, Any]) -> Values:
    """The numbers our functions give for ``case``, under the keys that its ``expected`` has."""
    kind = case["kind"]
    if kind not in KINDS:
        raise NotImplementedError(f"{case['id']}: kind {kind!r}; offered: {sorted(KINDS)}")
    refuse_ignored(case)
    with mx.stream(mx.cpu):
        values = KINDS[kind](case, fixtures.get(case["fixture"]) or {})
        return {key: _plain(value) for key, value in values.items() if key in case["expected"]}


def disagreements(case: Case, fixtures: dict[str, Any]) -> list[str]:
    """The keys at which ``evaluate`` is not what the case expects."""
    exact = mx.float64 == DTYPE and any(word in case["kind"] for word in WITHOUT_EXP)
    tolerance = FLOAT64 if exact else FLOAT32
    values, expected = evaluate(case, fixtures), case["expected"]
    assert values, f"{case['id']}: nothing to compare"
    if case["kind"] == "requirement":
        expected = {"advantages": np.zeros(len(values["advantages"]))}
    return [key for key, value in values.items() if not _close(value, expected[key], tolerance)]


def _close(value: Lists, expected: Lists, tolerance: tuple[float, float]) -> bool:
    got, wanted = np.asarray(value, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    return got.shape == wanted.shape and bool(np.allclose(got, wanted, rtol=tolerance[0], atol=tolerance[1]))


def _plain(value: Lists) -> Lists:
    return np.array(value).tolist() if isinstance(value, mx.array | np.ndarray) else value


def _array(values: Lists) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.float64), dtype=DTYPE)


def _mask(fixture: Values, name: str = "padded") -> mx.array:
    if name == "tool":
        return _array(fixture["mask"]) * _array(fixture["tool_mask"])
    return _array(fixture[MASKS[name]])


def _advantages(case: Case, fixture: Values) -> mx.array:
    """The case's own, per token, else the fixture's, one a row."""
    params = case["params"]
    if "advantages_per_token" in params:
        return _array(params["advantages_per_token"])
    if params.get("advantages") == "zeros":
        return _array(np.zeros((len(fixture["logp"]), 1)))
    rows = params.get("advantages")
    named = fixture.get("advantages_trl_group") or fixture["advantages"]
    return _array(rows if isinstance(rows, list) else named)[:, None]


def _with_gradient(loss: Callable[[mx.array], mx.array], at: mx.array) -> tuple[mx.array, mx.array]:
    value, gradient = mx.value_and_grad(loss)(at)
    return value, gradient


def _nonempty(mask: mx.array) -> float:
    return float(cast(float, (mask.sum(axis=-1) > 0).sum().item()))


# ---- policy losses


PolicyLoss = Callable[..., tuple[mx.array, losses.Metrics]]


def _grpo_term(params: Values) -> tuple[PolicyLoss, Values]:
    """TRL's policy term of a ``loss_type``, as our function and its hyperparameters."""
    low, high = params.get("eps_low", 0.2), params.get("eps_high", 0.2)
    level, delta = params.get("importance_sampling_level", "token"), params.get("delta")
    if level == "sequence" and (params["loss_type"] in ("cispo", "sapo") or params.get("beta")):
        raise NotImplementedError(f"{params['loss_type']} or a KL with a ratio of sequences is not offered")
    if delta is not None and delta <= 1 + high:
        raise NotImplementedError(f"delta {delta} within the clip range, where it is no dual clip, is not offered")
    if params["loss_type"] == "cispo":
        return losses.cispo_policy_loss, {"ratio_bounds": (0.0, high)}
    if params["loss_type"] == "sapo":
        temperatures = params.get("sapo_temperature_pos", 1.0), params.get("sapo_temperature_neg", 1.05)
        return losses.sapo_policy_loss, {"temperatures": temperatures}
    return losses.clipped_policy_loss, {"clip_range": (low, high), "dual_clip": delta, "ratio_level": level}


def _grpo_weights(params: Values, mask: mx.array, rows: int | None = None) -> mx.array:
    """TRL's normalisation: token means over ``num_items_in_batch`` (bnpo: over this batch), row means over all rows."""
    name = params["loss_type"]
    if name not in AGGREGATIONS:
        raise NotImplementedError(f"loss type {name!r} is not offered")
    total = None if name == "bnpo" else params.get("num_items_in_batch")
    length = params.get("max_completion_length", 12)
    return losses.aggregation_weights(mask, AGGREGATIONS[name], total_tokens=total, total_rows=rows, max_length=length)


def _trl_correction(case: Case, fixture: Values, mask: mx.array) -> mx.array | None:
    params = case["params"]
    if "off_policy_mask_threshold" in params:
        threshold = params["off_policy_mask_threshold"]
        logp, sampler = _array(fixture["logp"]), _array(fixture["rollout_logp"])
        return corrections.off_policy_mask(logp, sampler, _advantages(case, fixture), mask, threshold=threshold)
    if "mode" in params:
        level, mode = params["mode"].split("_")
        bounds = (params.get("clip_min"), params.get("clip_max"))
        old, sampler = _array(fixture["old_logp"]), _array(fixture["rollout_logp"])
        return corrections.sampler_correction(old, sampler, mask, level=level, mode=mode, bounds=bounds)
    return None


def _grpo_loss(case: Case, fixture: Values) -> Values:
    params = case["params"]
    mask = _mask(fixture, params.get("mask", "padded"))
    weights = _grpo_weights(params, mask)
    term, options = _grpo_term(params)
    options["correction"] = _trl_correction(case, fixture, mask)
    old = None if params.get("old_logp", "fixture") is None else _array(fixture["old_logp"])

    def loss(logp: mx.array) -> mx.array:
        before = mx.stop_gradient(logp) if old is None else old
        value, _ = term(logp, before, _advantages(case, fixture), mask, weights, **options)
        if params.get("beta"):
            gradient = "unbiased" if params.get("use_bias_correction_kl", True) else "naive"
            kl = lps.kl_penalty(logp, _array(fixture["ref_logp"]), before, mask, gradient=gradient)
            value = value + params["beta"] * losses.weighted_sum(kl, weights)
        if params.get("entropy_coef"):
            value = value - params["entropy_coef"] * lps.masked_mean(_array(fixture["entropy"]), mask)
        return value

    value, gradient = _with_gradient(loss, _array(fixture["logp"]))
    correction = options["correction"]
    kept = {} if correction is None else {"keep": correction[:, 0], "ratio": _trl_ratio(params, correction, mask)}
    return {"loss": value, "grad_logp": gradient} | kept


def _trl_ratio(params: Values, correction: mx.array, mask: mx.array) -> mx.array:
    """TRL's shape: (B, 1) for sequences, and 1 on padding for tokens."""
    if params.get("mode", "").startswith("sequence"):
        return correction[:, :1]
    return mx.where(mask > 0, correction, mx.ones_like(correction))


def _accumulated(case: Case, fixture: Values) -> Values:
    """Micro-batches whose weights carry the step's denominators; TRL's bnpo has only its own, over their number."""
    params = case["params"]
    term, options = _grpo_term(params)
    arrays = [_array(fixture[name]) for name in ("logp", "old_logp")] + [_advantages(case, fixture), _mask(fixture)]
    rows = arrays[0].shape[0]

    def loss(start: int, stop: int, share: float) -> float:
        *inputs, mask = (array[start:stop] for array in arrays)
        value, _ = term(*inputs, mask, share * _grpo_weights(params, mask, rows), **options)
        return float(cast(float, value.item()))

    share = 1 / len(params["micro_batches"]) if params["loss_type"] == "bnpo" else 1.0
    micro = [loss(start, stop, share) for start, stop in params["micro_batches"]]
    return {"micro_losses": micro, "sum": sum(micro), "one_batch": loss(0, rows, 1.0), "loss": sum(micro)}


def _gspo_loss(case: Case, fixture: Values) -> Values:
    params = case["params"] | {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    values = _grpo_loss(case | {"params": params}, fixture)
    mask = _mask(fixture, params.get("mask", "padded"))
    log_ratio = losses.policy_log_ratio(_array(fixture["logp"]), _array(fixture["old_logp"]), mask, level="sequence")
    return values | {"loss_verl": values["loss"], "sequence_ratio": mx.exp(log_ratio[:, 0])}


def _verl_term(case: Case) -> tuple[PolicyLoss, Values]:
    """verl's policy loss, named in the id (``loss/verl/<name>/...``), as our function and its hyperparameters."""
    params = case["params"]
    parts = case["id"].split("/")
    name = parts[2] if parts[:2] == ["loss", "verl"] else "vanilla"
    low, high = params.get("clip_ratio_low", 0.2), params.get("clip_ratio_high", 0.2)
    terms: dict[str, tuple[PolicyLoss, Values]] = {
        "vanilla": (losses.clipped_policy_loss, {"clip_range": (low, high), "dual_clip": params.get("clip_ratio_c")}),
        "gspo": (losses.clipped_policy_loss, {"clip_range": (low, high), "ratio_level": "sequence"}),
        "cispo": (losses.cispo_policy_loss, {"ratio_bounds": (1 - low, 1 + high)}),
        "sapo": (losses.sapo_policy_loss, {"temperatures": (params.get("tau_pos", 1.0), params.get("tau_neg", 1.05))}),
        "gpg": (losses.plain_policy_loss, {}),
        "geo_mean": (losses.geometric_policy_loss, {"clip_range": (low, high)}),
    }
    if name not in terms:
        raise NotImplementedError(f"policy loss {name!r}; offered: {sorted(terms)}")
    return terms[name]


def _verl_weights(name: str, mask: mx.array, scale: int | None = None) -> mx.array:
    """verl's normalisation: row means over the non-empty rows, and the padded width where no length is given."""
    mode = AGGREGATIONS[name.split(" ")[0]]
    return losses.aggregation_weights(mask, mode, total_rows=_nonempty(mask), max_length=scale or mask.shape[1])


def _ppo_policy_loss(case: Case, fixture: Values) -> Values:
    params = case["params"]
    mask = _mask(fixture, params.get("mask", "padded"))
    term, options = _verl_term(case)
    if term is losses.geometric_policy_loss:  # a mean over all rows
        weights = losses.aggregation_weights(mask, "sequence_mean")
    else:
        mode = "seq-mean-token-mean" if term is losses.sapo_policy_loss else params.get("loss_agg_mode", "token-mean")
        weights = _verl_weights(mode, mask, params.get("loss_scale_factor"))
    options["correction"] = params.get("weights")

    def loss(logp: mx.array) -> mx.array:
        return term(logp, _array(fixture["old_logp"]), _advantages(case, fixture), mask, weights, **options)[0]

    value, gradient = _with_gradient(loss, _array(fixture["logp"]))
    return {"loss": value, "grad_logp": gradient}


def _importance_sampling(case: Case, fixture: Values) -> Values:
    if "mode" in case["params"]:
        return _grpo_loss(case | {"params": {"loss_type": "dapo", "eps_high": 0.28} | case["params"]}, fixture)
    level = case["params"]["level"]
    low, high = _bounds(case["params"]["threshold"])
    old, sampler, mask = _array(fixture["old_logp"]), _array(fixture["rollout_logp"]), _mask(fixture)
    mode: Literal["truncate", "mask"] = "truncate" if low is None else "mask"
    weights = corrections.sampler_correction(old, sampler, mask, level=level, mode=mode, bounds=(low, high))
    params = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "weights": weights}
    return {"weights": weights} | _ppo_policy_loss(case | {"params": params}, fixture)


def _bounds(threshold: str | float) -> tuple[float | None, float]:
    """verl's thresholds: an upper bound, or ``"lower_upper"``."""
    *low, high = (float(part) for part in str(threshold).split("_"))
    return (low[0] if low else None), high


def _rejection_mask(case: Case, fixture: Values) -> Values:
    level, estimator = case["params"]["option"].replace("seq_", "sequence_").rsplit("_", 1)
    bounds = _bounds(case["params"]["threshold"])
    old, sampler = _array(fixture["old_logp"]), _array(fixture["rollout_logp"])
    return {
        "mask": corrections.rejection_mask(
            old, sampler, _mask(fixture), level=level, estimator=estimator, bounds=bounds
        )
    }


def _aggregation(case: Case, fixture: Values) -> Values:
    params = case["params"]
    mask = _mask(fixture, params["mask"])
    weights = _verl_weights(params["loss_agg_mode"], mask, params.get("loss_scale_factor"))
    return {"value": losses.weighted_sum(_array(fixture[params["loss_mat"]]), weights)}


def _value_loss(case: Case, fixture: Values) -> Values:
    mask = _mask(fixture, case["params"].get("mask", "mask"))
    weights = losses.aggregation_weights(mask, "token_mean")
    old, returns = _array(fixture["values"]), _array(case["expected"]["returns"])

    def loss(values: mx.array) -> mx.array:
        return losses.clipped_value_loss(
            values, old, returns, mask, weights, clip_range=case["params"]["cliprange_value"]
        )[0]

    value, gradient = _with_gradient(loss, _array(fixture["vpreds"]))
    return {"loss": value, "grad_vpreds": gradient, "returns": returns}


# ---- KL


def _kl(case: Case, fixture: Values) -> Values:
    name = case["params"]["estimator"]
    if name.removesuffix("+") not in KL_NAMES:
        raise NotImplementedError(f"KL estimator {name!r}; offered: {sorted(KL_NAMES)}")
    logp, ref, mask = _array(fixture["logp"]), _array(fixture["ref_logp"]), _mask(fixture)
    gradient = "unbiased" if name.endswith("+") else "naive"

    def per_token(logp: mx.array, mask: mx.array) -> mx.array:
        return lps.kl_penalty(logp, ref, None, mask, estimator=KL_NAMES[name.removesuffix("+")], gradient=gradient)

    total, slope = _with_gradient(lambda x: per_token(x, mask).sum(), logp)
    # verl's numbers for the extreme fixture stand on padding too.
    shown = per_token(logp, mx.ones_like(mask) if case["fixture"] == "extreme" else mask)
    return {"per_token": shown, "sum_over_mask": total, "grad_logp_of_sum": slope}


def _kl_controller(case: Case, fixture: Values) -> Values:
    params = case["params"]
    controller = adv.AdaptiveKL(params["init"], target=params["target"], horizon=params["horizon"])
    coefs = []
    for kl in params["current_kl"]:
        controller = controller.update(kl, samples=params["n_steps"])
        coefs.append(controller.coef)
    return {"coef": coefs}


# ---- advantages


def _group_advantage(case: Case, fixture: Values) -> Values:
    params = case["params"]
    rewards, size = fixture["rewards"], fixture["group_size"]
    if "rloo" in case["id"]:
        if params.get("reward_clip_range"):
            rewards = np.clip(rewards, *params["reward_clip_range"])
        scale = "batch" if params.get("normalize_advantages") else "none"
        if params.get("beta"):
            divergence = lps.kl_estimate(_array(fixture["old_logp"]), _array(fixture["ref_logp"]), estimator="k1")
            rewards = np.array(rewards) - params["beta"] * np.array(lps.masked_sum(divergence, _mask(fixture), axis=-1))
        eps = params.get("eps", 1e-4)
        return {"advantages": adv.leave_one_out_advantages(rewards, size, scale=scale, eps=eps)}
    scale = params["scale_rewards"]
    return {"advantages": adv.group_advantages(rewards, size, scale=scale, eps=params.get("eps", 1e-4))}


def _group_advantage_tokens(case: Case, fixture: Values) -> Values:
    params, mask = case["params"], _mask(fixture)
    rewards, size = fixture["rewards"], fixture["group_size"]
    name = case["id"].split("/")[2]
    if name == "opo":
        rows = adv.length_weighted_advantages(rewards, fixture["lengths"], size)
    elif name in ("rloo", "rloo_vectorized"):
        rows = adv.leave_one_out_advantages(rewards, size)
    elif name.startswith("grpo") and "passk" not in name:
        scale = "group" if params.get("norm_adv_by_std_in_grpo", True) else "none"
        rows = adv.group_advantages(rewards, size, scale=scale, eps=params.get("eps", 1e-6))
    elif name == "gpg":
        rows = adv.group_advantages(rewards, size, scale="none") * len(rewards) / np.count_nonzero(rewards)
    elif name == "reinforce_plus_plus_baseline":
        whitened = adv.reinforce_plus_plus_baseline(rewards, mask, size)
        return {"advantages": whitened, "returns": whitened}
    else:
        raise NotImplementedError(f"{case['id']}: advantage estimator {name!r} is not offered")
    tokens = _array(rows)[:, None] * mask
    return {"advantages": tokens, "returns": tokens}


def _token_advantage(case: Case, fixture: Values) -> Values:
    if "reinforce_plus_plus" not in case["id"]:
        raise NotImplementedError(f"{case['id']}: not offered")
    if "baseline" in case["id"]:
        return _group_advantage_tokens(case, fixture)
    mask = _mask(fixture)
    rewards = adv.token_rewards(_array(fixture["rewards"])[:, None], mask)
    advantages, returns = adv.reinforce_plus_plus(rewards, mask, gamma=case["params"].get("gamma", 1.0))
    return {"advantages": advantages, "returns": returns}


def _multi_reward_advantage(case: Case, fixture: Values) -> Values:
    params = case["params"]
    # An infinity stands for a reward that was not scored.
    rewards = np.asarray(params["rewards_per_func"], dtype=np.float64)
    return {
        "advantages": adv.multi_reward_advantages(
            np.where(np.isinf(rewards), np.nan, rewards),
            params["weights"],
            params["group_size"],
            order=params["aggregation"],
            scale=params.get("scale_rewards", "group"),
        )
    }


def _requirement(case: Case, fixture: Values) -> Values:
    groups = [np.full(item["G"], item["value"], dtype=np.float32) for item in case["params"]["rewards"]]
    return {"advantages": [float(a) for group in groups for a in adv.group_advantages(group, group.size, eps=1e-6)]}


def _truncation_mask(case: Case, fixture: Values) -> Values:
    mask = losses.without_truncated(_mask(fixture), mx.array(fixture["truncated"])[:, None])
    rows = adv.group_advantages(fixture["rewards"], fixture["group_size"])
    return {"completion_mask": mask, "advantages": rows, "num_items_in_batch": mask.sum()}


def _gae(case: Case, fixture: Values) -> Values:
    """verl carries across holes; TRL steps through them, which is our function without a mask."""
    params = case["params"]
    mask = _mask(fixture, params.get("mask", "mask"))
    values, rewards = _array(fixture["values"]), _array(fixture["token_level_scores"])
    seen = mx.ones_like(mask) if case["oracle"].startswith("trl") else mask
    values = lps.masked(values, _mask(fixture)) if case["oracle"].startswith("trl") else values
    raw, returns = adv.gae(rewards, values, seen, gamma=params["gamma"], gae_lambda=params["lam"])
    whitened = lps.masked_whiten(raw, mask)
    return {
        "raw_advantages_masked": lps.masked(raw, mask),
        "advantages_masked": whitened,
        "advantages": whitened,
        "returns_masked": lps.masked(returns, mask),
        "returns": lps.masked(returns, mask),
    }


def _ppo_advantages_trl(case: Case, fixture: Values) -> Values:
    """TRL 1.12's PPO: the score stands one past the last token where there is room, and that position has a value."""
    params, mask = case["params"], _mask(fixture)
    width = mask.shape[1]
    value_mask = _array([[float(t <= length) for t in range(width)] for length in fixture["lengths"]])
    scores = _array(fixture["score"])[:, None]
    old, ref = _array(fixture["old_logp"]), _array(fixture["ref_logp"])
    estimator = KL_NAMES[params["kl_estimator"]]
    penalties = adv.kl_in_reward(mx.zeros_like(scores), old, ref, mask, kl_coef=params["kl_coef"], estimator=estimator)
    rewards = penalties + adv.token_rewards(scores, value_mask)
    if params["whiten_rewards"]:
        rewards = lps.masked_whiten(rewards, value_mask, shift="keep_mean")
    values = lps.masked(_array(fixture["values"]), value_mask)
    raw, returns = adv.gae(rewards, values, value_mask, gamma=params["gamma"], gae_lambda=params["lam"])
    return {"rewards": rewards, "returns": returns, "advantages": lps.masked_whiten(raw, mask)}


def _masked_whiten(case: Case, fixture: Values) -> Values:
    x, mask = _array(fixture[case["params"]["x"]]), _mask(fixture, case["params"]["mask"])
    return {
        "shift_mean_true": lps.masked_whiten(x, mask),
        "shift_mean_false": lps.masked_whiten(x, mask, shift="keep_mean"),
    }


# ---- logits, SFT, rewards


def _logits(case: Case, fixture: Values) -> Values:
    params = case["params"]
    logits, tokens, mask = _array(fixture["logits"]), mx.array(fixture["ids"]), _array(fixture["mask"])
    temperature, weights = params["temperature"], losses.aggregation_weights(mask, "token_mean")
    low, high = params["eps"]
    before = lps.token_logprobs(logits, tokens, temperature=temperature)

    def loss(z: mx.array) -> mx.array:
        logp = lps.token_logprobs(z, tokens, temperature=temperature)
        rows = _array(params["advantages"])[:, None]
        value, _ = losses.clipped_policy_loss(logp, before, rows, mask, weights, clip_range=(low, high))
        kl = lps.kl_penalty(logp, before - 0.1, before, mask)
        bonus = lps.entropy(z, temperature=temperature)
        return value + losses.weighted_sum(params["beta"] * kl - params["entropy_coef"] * bonus, weights)

    value, gradient = _with_gradient(loss, logits)
    entropy = lps.entropy(logits, temperature=temperature)
    return {"logp": before, "entropy": entropy, "loss": value, "grad_logits": gradient}


def _sft_loss(case: Case, fixture: Values) -> Values:
    logits, tokens, mask = _array(fixture["logits"]), mx.array(fixture["ids"]), _array(fixture["mask"])
    weights = losses.aggregation_weights(mask, "token_mean")
    results: Values = {}
    for name, function in {"nll": losses.nll_loss, "dft": losses.dft_loss}.items():
        results[name], results[f"grad_{name}"] = _with_gradient(
            lambda z, function=function: function(lps.token_logprobs(z, tokens), weights)[0], logits
        )
    return results


def _reward(case: Case, fixture: Values) -> Values:
    params = case["params"]
    if "ngram" in params:
        ngram, most = params["ngram"], params["max_penalty"]
        return {"rewards": [shaping.repetition_penalty(ids, ngram=ngram, max_penalty=most) for ids in params["ids"]]}
    caps = [value for name, value in params.items() if "max" in name.lower()]
    caches = [value for name, value in params.items() if "cache" in name.lower()]
    if not caps or not caches:
        raise NotImplementedError(f"{case['id']}: reward of {sorted(params)} is not offered")
    completions = next(value for value in params.values() if isinstance(value, list))
    lengths = [len(item) if isinstance(item, list) else item for item in completions]
    return {"rewards": [shaping.soft_overlong_penalty(n, max_length=caps[0], cache=caches[0]) for n in lengths]}


KINDS: dict[str, Callable[[Case, Values], Values]] = {
    "aggregation": _aggregation,
    "gae": _gae,
    "group_advantage": _group_advantage,
    "group_advantage_tokens": _group_advantage_tokens,
    "grpo_loss": _grpo_loss,
    "grpo_loss_accumulated": _accumulated,
    "gspo_loss": _gspo_loss,
    "importance_sampling": _importance_sampling,
    "kl": _kl,
    "kl_controller": _kl_controller,
    "kl_grad": _grpo_loss,
    "logits": _logits,
    "masked_whiten": _masked_whiten,
    "multi_reward_advantage": _multi_reward_advantage,
    "ppo_advantages_trl": _ppo_advantages_trl,
    "ppo_policy_loss": _ppo_policy_loss,
    "rejection_mask": _rejection_mask,
    "requirement": _requirement,
    "reward": _reward,
    "sft_loss": _sft_loss,
    "token_advantage": _token_advantage,
    "truncation_mask": _truncation_mask,
    "value_loss": _value_loss,
}
