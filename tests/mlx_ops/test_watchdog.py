import json

import pytest

from configs.schema import WatchdogConfig
from mlx_ops.watchdog import ADVICE, Watchdog, symptoms

HEALTHY = {
    "reward": 0.5,
    "groups_without_signal": 0.5,
    "sampler_entropy": 0.6,
    "truncated": 0.2,
    "sampler_gap_mean": 1e-4,
    "value_loss": 0.1,
}
SICK = {
    "constant_groups": {"groups_without_signal": 1.0},
    "entropy_gone": {"sampler_entropy": 0.001},
    "at_length_cap": {"truncated": 0.95},
    "sampler_apart": {"sampler_gap_mean": 0.5},
    "value_loss": {"value_loss": 1e4},
}


def look(watchdog, rows):
    """The names told after each row."""
    return [[symptom.name for symptom in watchdog.look(row)] for row in rows]


@pytest.mark.parametrize(("name", "change"), SICK.items(), ids=SICK)
def test_a_symptom_is_told_when_it_has_lasted_and_again_as_long_after(name, change):
    watchdog = Watchdog(WatchdogConfig(patience=3))
    rows = [HEALTHY | change | {"reward": float(step)} for step in range(7)]
    assert look(watchdog, rows) == [[], [], [name], [], [], [name], []]
    assert [symptom.name for symptom in watchdog.lasting] == [name]
    assert watchdog.lasting[0].steps == 7


@pytest.mark.parametrize("change", SICK.values(), ids=SICK)
def test_one_healthy_step_starts_the_count_anew_and_a_step_without_the_metric_does_not(change):
    watchdog = Watchdog(WatchdogConfig(patience=2))
    (metric,) = change
    healthy = {name: value for name, value in HEALTHY.items() if name != "reward"}
    silent = {name: value for name, value in healthy.items() if name != metric}
    assert look(watchdog, [healthy | change, healthy, healthy | change, silent]) == [[], [], [], []]
    assert len(look(watchdog, [healthy | change])[0]) == 1


def test_a_value_loss_that_is_no_number_is_a_symptom():
    assert symptoms({"value_loss": float("nan")}, WatchdogConfig())["value_loss"]
    assert symptoms(HEALTHY, WatchdogConfig()) == dict.fromkeys(SICK, "")


def rewards(values):
    return [{"reward": value} for value in values]


def test_a_reward_that_stays_is_flat_after_three_times_the_patience():
    # Four steps are the start; flat is judged from the eighth on and has lasted four steps at the eleventh.
    told = look(Watchdog(WatchdogConfig(patience=4)), rewards([0.2, 0.4, 0.2, 0.4] * 3))
    assert told == [[]] * 10 + [["reward_flat"], []]


def test_a_reward_that_rises_beyond_its_noise_is_not_flat():
    watchdog = Watchdog(WatchdogConfig(patience=4))
    assert look(watchdog, rewards([0.2, 0.4, 0.2, 0.4, *[0.5, 0.7] * 6])) == [[]] * 16
    # 0.05 above the start is within two standard errors of 0.08.
    assert ["reward_flat"] in look(Watchdog(watchdog.config), rewards([0.2, 0.4, 0.2, 0.4, *[0.25, 0.45] * 6]))


def test_a_reward_that_falls_back_to_the_start_is_flat():
    told = look(Watchdog(WatchdogConfig(patience=2)), rewards([0.1, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]))
    # The last two are .9 and .9, .9 and .1 (within the noise of the start), .1 and .1.
    assert told == [[]] * 6 + [["reward_flat"], [], ["reward_flat"]]


def test_a_restored_watchdog_goes_on_where_it_was():
    rows = [HEALTHY | {"reward": 0.5 + 0.1 * (step % 2), "truncated": 1.0} for step in range(12)]
    whole, first = Watchdog(WatchdogConfig(patience=3)), Watchdog(WatchdogConfig(patience=3))
    told = look(whole, rows)
    look(first, rows[:5])
    second = Watchdog(WatchdogConfig(patience=3))
    second.restore(json.loads(json.dumps(first.state())))
    assert look(second, rows[5:]) == told[5:]
    assert second.state() == whole.state()
    assert any("reward_flat" in names for names in told[5:])


def test_every_symptom_says_what_helps():
    assert set(ADVICE) == {*SICK, "reward_flat"}
    watchdog = Watchdog(WatchdogConfig(patience=1))
    (symptom,) = watchdog.look(HEALTHY | SICK["at_length_cap"])
    assert str(symptom) == (
        "at_length_cap for 1 steps (truncated 0.95, most 0.9): completions run into the token limit; "
        "raise sampling.max_tokens or reward stopping"
    )
