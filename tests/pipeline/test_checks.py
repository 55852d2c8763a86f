import dagster as dg
import pytest

from pipeline.checks import overlap, quarters, reward_results, split_results, training_rows, weights_fault
from pipeline.resources import MlxResource
from pipeline.sinks import METRICS, JsonLines
from rewards.base import Example

KEY = dg.AssetKey(["tiny", "grpo_checkpoint"])


def examples(*prompts: str) -> list[Example]:
    return [Example(id=f"{place}-{prompt[:8]}", prompt=prompt) for place, prompt in enumerate(prompts)]


def chat(name: str, *turns: str) -> Example:
    messages = tuple({"role": "user", "content": turn} for turn in turns)
    return Example(id=name, prompt="", messages=messages)


def test_a_question_on_both_sides_is_found_in_spite_of_spaces_and_case():
    train, test = examples("What is 2 + 2?", "Name a  prime."), examples("name a prime. ", "What is 2 + 3?")
    assert overlap(train, test) == [test[0].id]


def test_chats_are_compared_by_their_turns():
    assert overlap([chat("a", "Hi", "2 + 2?")], [chat("b", "hi", "2 + 2?"), chat("c", "hi", "2 + 3?")]) == ["b"]


@pytest.mark.parametrize(
    ("train", "test", "wants_test", "expected"),
    [
        (["a"], ["b"], True, {"not_empty": True, "no_overlap": True}),
        ([], ["b"], True, {"not_empty": False, "no_overlap": True}),
        (["a"], [], True, {"not_empty": False, "no_overlap": True}),
        (["a"], [], False, {"not_empty": True, "no_overlap": True}),
        (["a", "b"], ["b"], True, {"not_empty": True, "no_overlap": False}),
    ],
    ids=["as it should be", "no train", "no test", "none is wanted", "one on both sides"],
)
def test_the_splits_must_have_examples_and_share_none(train, test, wants_test, expected):
    results = split_results(KEY, examples(*train), examples(*test), wants_test=wants_test)
    assert {result.check_name: result.passed for result in results} == expected


def verdicts(rewards: list[float], stds: list[float]) -> dict[str | None, bool]:
    rows = [{"step": 1 + i, "reward": r, "reward_std": s} for i, (r, s) in enumerate(zip(rewards, stds, strict=True))]
    results = list(reward_results(KEY, rows))
    assert {result.severity for result in results} == {dg.AssetCheckSeverity.WARN}
    return {result.check_name: result.passed for result in results}


def test_a_reward_that_rises_passes():
    assert verdicts([0.1, 0.2, 0.1, 0.3, 0.2, 0.4, 0.5, 0.4], [0.1] * 8) == {
        "reward_varied": True,
        "reward_improved": True,
    }


def test_a_reward_that_ends_where_it_began_is_a_warning_whatever_it_did_between():
    assert verdicts([0.2, 0.2, 0.9, 0.9, 0.9, 0.9, 0.2, 0.2], [0.1] * 8)["reward_improved"] is False


def test_groups_without_any_difference_are_a_warning():
    assert verdicts([0.0, 0.0, 0.0, 0.0], [0.0] * 4)["reward_varied"] is False
    assert verdicts([0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.2])["reward_varied"] is True


def test_the_first_and_last_quarter_do_not_meet():
    assert quarters([1, 2, 3, 4, 5, 6, 7, 8]) == (1.5, 7.5)
    assert quarters([3]) == (3, 3)
    assert quarters([]) == (0, 0)


def test_the_numbers_of_a_checkpoints_training_are_found_from_its_folder(tmp_path):
    checkpoint = tmp_path / "run" / "published" / "step_000002"
    checkpoint.mkdir(parents=True)
    sink = JsonLines(tmp_path / "run" / METRICS)
    sink.report(1, {"reward": 0.5})
    sink.close(failed=False)
    assert [row["reward"] for row in training_rows(checkpoint)] == [0.5]
    assert training_rows(tmp_path / "elsewhere" / "published" / "step_000002") == []


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    fault = weights_fault(tmp_path, MlxResource(device="cpu"))
    assert fault is not None
    assert str(tmp_path) in fault
