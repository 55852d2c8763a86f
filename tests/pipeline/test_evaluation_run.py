import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BaseModel
from tokenizers.processors import TemplateProcessing

from configs.schema import PromptConfig, RewardConfig, Strict
from mlx_ops.batching import Completion
from mlx_ops.model import train_tokenizer
from pipeline.evaluation.base import (
    BaseEvaluator,
    EvaluatorRegistry,
    Grade,
    ItemResult,
    Output,
    Problem,
    mean_scores,
)
from pipeline.evaluation.drawing import continuation_text, cut_at_stop, end_tokens, render
from pipeline.evaluation.report_files import read_items, read_report, untimed
from pipeline.evaluation.run import check_evaluation, evaluate
from rewards.base import BaseReward, Example, RewardRegistry
from tests.pipeline.evaluating import config, context, speak, speaker, sums, tokenizer


class EchoOptions(Strict):
    fail: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


@EvaluatorRegistry.register("echo")
class Echo(BaseEvaluator):
    """Right where the completion is the answer; grading the named items fails."""

    Options: ClassVar[type[BaseModel]] = EchoOptions

    @property
    def metric(self) -> str:
        return "right"

    def problems(self) -> list[Problem]:
        return [Problem(example, PromptConfig(chat=False), example.answer) for example in self.context.test]

    @property
    def stop(self) -> tuple[str, ...]:
        return self.options.stop

    def grade(self, problem: Problem, outputs: Sequence[Output]) -> ItemResult:
        if problem.id in self.options.fail:
            raise ValueError(f"{problem.id} has a broken reference")
        grades = tuple(Grade({"right": float(output.text == problem.reference)}) for output in outputs)
        return ItemResult(mean_scores(grades), grades)


@RewardRegistry.register("trial_exact")
class Exact(BaseReward):
    """2 where the completion is the answer, else -1; None for what is empty."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        pairs = zip(completions, columns["answer"], strict=True)
        return [None if not text else 2.0 if text == answer else -1.0 for text, answer in pairs]


@RewardRegistry.register("trial_bonus")
class Bonus(BaseReward):
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> Sequence[float | None]:
        return [0.5 for _ in completions]


def right_of(prompt: str, seed: int) -> str:
    """The sum that the prompt asks for."""
    left, _, right = prompt.rpartition("What is ")[2].rstrip("?").partition(" + ")
    return str(int(left) + int(right.partition("?")[0]))


def wrong_above(limit: int):
    return lambda prompt, seed: right_of(prompt, seed) if int(right_of(prompt, seed)) < limit else "none"


def test_a_score_is_the_mean_over_problems_with_its_interval(tmp_path):
    report = evaluate(
        speaker(wrong_above(6), tmp_path),
        config("echo"),
        context=context(sums(4)),
        directory=tmp_path / "r",
        generate=speak,
    )
    head = report.headline
    assert (head.name, head.score, head.n, head.interval) == ("right", 0.75, 4, "wilson")
    assert (head.low, head.high) == pytest.approx((0.30064, 0.95442), abs=1e-5)
    assert head.stderr == pytest.approx(0.25)


def test_a_problem_that_cannot_be_graded_counts_as_wrong_and_keeps_its_error(tmp_path):
    run = config("echo", options={"fail": ["sum-1"]})
    report = evaluate(
        speaker(right_of, tmp_path), run, context=context(sums(4)), directory=tmp_path / "r", generate=speak
    )
    assert (report.headline.score, report.headline.n, report.counts.failed_problems) == (0.75, 4, 1)
    item = read_items(tmp_path / "r")[1]
    assert item.error == "ValueError: sum-1 has a broken reference"
    assert item.scores["right"] == 0
    assert item.samples[0].text == "4"
    assert any("1 problems could not be graded" in warning for warning in report.warnings)


def test_an_evaluation_in_which_nothing_can_be_graded_is_no_score(tmp_path):
    run = config("echo", options={"fail": ["sum-0", "sum-1"]})
    with pytest.raises(RuntimeError, match="no problem could be graded: ValueError: sum-0"):
        evaluate(speaker("1", tmp_path), run, context=context(sums(2)), directory=tmp_path / "r", generate=speak)
    assert not (tmp_path / "r").exists()


def test_two_runs_of_one_seed_are_equal_but_for_the_times(tmp_path):
    def run(name: str, seed: int):
        run_config = config("echo", samples=3, temperature=1.0)
        policy = speaker(lambda prompt, row: f"{right_of(prompt, row)}{'' if row % 2 else '0'}", tmp_path)
        report = evaluate(
            policy, run_config, context=context(sums(6), seed=seed), directory=tmp_path / name, generate=speak
        )
        assert read_report(tmp_path / name) == report
        return report, read_items(tmp_path / name)

    first, second, other = run("a", 1), run("b", 1), run("c", 2)
    assert untimed(*first) == untimed(*second)
    assert untimed(*first) != untimed(*other)


def test_a_rows_seed_depends_on_neither_order_nor_limit_nor_batch(tmp_path):
    def seeds(examples, **fields):
        seen = {}
        policy = speaker(lambda prompt, row: seen.setdefault(prompt, []).append(row) or "x", tmp_path)
        run = config("echo", samples=2, temperature=1.0, **fields)
        evaluate(policy, run, context=context(examples), directory=tmp_path / "r", generate=speak)
        return seen

    whole = seeds(sums(5))
    part = seeds(list(reversed(sums(5)))[2:], limit=2, batch_size=1)
    assert len({seed for rows in whole.values() for seed in rows}) == 10
    assert part == {prompt: whole[prompt] for prompt in ("What is 3 + 2?", "What is 3 + 1?")}


def test_the_longest_prompts_are_drawn_first_and_results_keep_their_order(tmp_path):
    seen: list[str] = []
    examples = [Example("a", "one", answer="A"), Example("b", "one two three four", answer="B")]
    answers = {"one": "A", "one two three four": "B"}
    policy = speaker(lambda prompt, row: seen.append(prompt) or answers[prompt], tmp_path)
    report = evaluate(policy, config("echo"), context=context(examples), directory=tmp_path / "r", generate=speak)
    assert seen == ["one two three four", "one"]
    assert report.headline.score == 1
    assert [item.id for item in read_items(tmp_path / "r")] == ["a", "b"]


def test_stop_strings_end_a_completion_and_are_cut_off(tmp_path):
    run = config("echo", options={"stop": ["Question:", "\n#"]})
    policy = speaker("7\n#### 7\nQuestion: What", tmp_path)
    report = evaluate(
        policy, run, context=context([Example("q", "?", answer="7")]), directory=tmp_path / "r", generate=speak
    )
    sample = read_items(tmp_path / "r")[0].samples[0]
    assert (sample.text, sample.finish, report.headline.score) == ("7", "stop", 1)
    # The engine stopped at "\n#": nothing of the run-on was drawn.
    assert sample.tokens <= len(tokenizer().encode("7\n####"))


def test_a_cut_completion_is_counted_and_named(tmp_path):
    examples = [Example("long", "long", answer="7 7 7 7"), Example("short", "short", answer="7")]
    answers = {"long": "7 7 7 7", "short": "7"}
    policy = speaker(lambda prompt, row: answers[prompt], tmp_path)
    report = evaluate(
        policy, config("echo", max_tokens=3), context=context(examples), directory=tmp_path / "r", generate=speak
    )
    assert [item.samples[0].finish for item in read_items(tmp_path / "r")] == ["length", "end"]
    assert (report.counts.truncated, report.metric("truncated").score) == (1, 0.5)
    assert any("50.0% of the completions were cut at 3 tokens" in warning for warning in report.warnings)


def test_a_limit_takes_the_first_items_and_is_in_the_report(tmp_path):
    report = evaluate(
        speaker(right_of, tmp_path),
        config("echo", limit=2),
        context=context(sums(5)),
        directory=tmp_path / "r",
        generate=speak,
    )
    dataset = report.dataset
    assert (dataset.available, dataset.items, dataset.limit, dataset.item_ids) == (5, 2, 2, ("sum-0", "sum-1"))
    assert "Only 2 of 5 items were put to the model." in report.warnings


def test_training_prompts_among_the_items_are_reported(tmp_path):
    surroundings = context(sums(3), train=[Example("t", "what is 3 + 1")])
    report = evaluate(
        speaker(right_of, tmp_path), config("echo"), context=surroundings, directory=tmp_path / "r", generate=speak
    )
    assert report.contamination is not None
    assert (report.contamination.exact, report.contamination.examples) == (1, ("sum-1",))
    assert any("1 items are training prompts" in warning for warning in report.warnings)


def test_several_samples_at_temperature_zero_are_refused():
    with pytest.raises(ValueError, match="4 samples at temperature 0 are all the same"):
        check_evaluation(config("echo", samples=4))


def test_an_unknown_benchmark_and_a_misspelt_option_name_what_there_is():
    with pytest.raises(ValueError, match=r"unknown benchmark 'gsm9k'; registered: .*'gsm8k', 'held_out', 'humaneval'"):
        check_evaluation(config("gsm9k"))
    with pytest.raises(ValueError, match=r"options of evaluation 'echo'.*\n  fial: unknown key"):
        check_evaluation(config("echo", options={"fial": []}))


def test_items_with_one_id_are_refused(tmp_path):
    twice = [*sums(2), *sums(1)]
    with pytest.raises(ValueError, match="two items have the id 'sum-0'"):
        evaluate(
            speaker("1", tmp_path), config("echo"), context=context(twice), directory=tmp_path / "r", generate=speak
        )


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no items"):
        evaluate(speaker("1", tmp_path), config("echo"), context=context([]), directory=tmp_path / "r", generate=speak)


# ---- tokens and text -----------------------------------------------------------------------------------------------


def test_a_templated_prompt_is_rendered_once_and_continued_by_the_prefix():
    ids = tokenizer()
    problem = Problem(Example("x", "3 + 4"), PromptConfig(), prefix="The answer is")
    assert ids.decode(list(render(problem, ids))) == "user: 3 + 4\nassistant: The answer is"


def test_a_start_token_is_neither_doubled_nor_put_into_the_middle():
    hf = train_tokenizer(["What is 3 + 4?"], 300)
    hf.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 0)])
    hf.chat_template = "<pad>{{ messages[0]['content'] }}"
    ids = TokenizerWrapper(hf)
    assert ids.encode("3").count(0) == 1
    for prompt in (PromptConfig(), PromptConfig(chat=False)):
        tokens = render(Problem(Example("x", "3 + 4"), prompt, prefix=" is"), ids)
        assert (tokens[0], tokens.count(0), ids.decode(list(tokens))) == (0, 1, "<pad>3 + 4 is")


def test_special_tokens_are_no_text(tmp_path):
    report = evaluate(
        speaker("7<pad>", tmp_path),
        config("echo"),
        context=context([Example("q", "?", answer="7")]),
        directory=tmp_path / "r",
        generate=speak,
    )
    assert report.headline.score == 1


def test_text_is_decoded_behind_the_prompt():
    # SentencePiece's decoding: pieces mark a space by "_", and the one at the beginning is dropped.
    pieces = {1: "def", 2: "_f:", 3: "____return", 4: "_1"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids).replace("_", " ").removeprefix(" ")

    assert decode([3, 4]) == "   return 1"
    assert continuation_text([1, 2], [3, 4], decode) == "    return 1"


def test_the_first_stop_string_cuts_whatever_its_place_in_the_list():
    assert cut_at_stop("a\ndef b\nclass c", ["\nclass", "\ndef"]) == "a"
    assert cut_at_stop("a b", ["\ndef"]) == "a b"


def test_a_stop_string_that_is_a_special_token_ends_as_that_token():
    ids = tokenizer()
    pad = ids.convert_tokens_to_ids("<pad>")
    assert end_tokens(ids, ["<pad>", "Question:"]) == {ids.eos_token_id, pad}


def test_a_row_that_ends_at_a_stop_string_is_not_cut(tmp_path):
    ids = tokenizer()

    def generate(model: Any, prompts: Any, **_: Any) -> list[Completion]:
        return [Completion(tuple(ids.encode("7 Question:", add_special_tokens=False)), (), truncated=True)]

    run = config("echo", options={"stop": ["Question:"]})
    report = evaluate(
        speaker("", tmp_path),
        run,
        context=context([Example("q", "?", answer="7 ")]),
        directory=tmp_path / "r",
        generate=generate,
    )
    assert (report.counts.truncated, report.headline.score) == (0, 1)


# ---- held_out ------------------------------------------------------------------------------------------------------


def held_out(tmp_path, answer, examples, **fields):
    rewards = (RewardConfig(name="trial_bonus", weight=0), RewardConfig(name="trial_exact", weight=0.5))
    surroundings = context(examples, rewards=rewards)
    run = config("held_out", **fields)
    return evaluate(speaker(answer, tmp_path), run, context=surroundings, directory=tmp_path / "r", generate=speak)


def test_held_out_counts_what_the_first_weighted_reward_calls_right(tmp_path):
    report = held_out(tmp_path, wrong_above(6), sums(4), options={"threshold": 2.0})
    # Three right, one wrong: totals 0.5 * 2 three times and 0.5 * -1 once.
    assert (report.headline.name, report.headline.score) == ("accuracy", 0.75)
    assert report.metric("reward").score == pytest.approx((3 * 1.0 - 0.5) / 4)
    assert report.metric("reward/trial_exact").score == pytest.approx((3 * 2 - 1) / 4)
    assert report.metric("reward/trial_bonus").score == 0.5


def test_held_out_leaves_what_was_not_scored_out_of_the_mean_and_counts_it(tmp_path):
    report = held_out(tmp_path, lambda prompt, row: "" if "+ 0" in prompt else right_of(prompt, row), sums(4))
    assert (report.headline.score, report.headline.n, report.counts.unscored) == (1.0, 3, 1)


def test_any_reward_may_judge_any_dataset(tmp_path):
    rows = [{"q": f"What is {n} + {n}?", "a": str(2 * n)} for n in range(3)]
    (tmp_path / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"kind": "jsonl", "path": str(tmp_path / "doubles.jsonl")}
    dataset = {"name": "doubles", "train": {**source, "path": str(tmp_path / "train.jsonl")}, "test": source}
    (tmp_path / "train.jsonl").write_text('{"q": "What is 9 + 9?", "a": "18"}\n', encoding="utf-8")
    options = {
        "dataset": {**dataset, "fields": {"prompt": "q", "answer": "a"}},
        "rewards": [{"name": "numeric_answer"}, {"name": "repetition", "weight": 0}],
    }
    report = held_out(tmp_path, "The answer is 2.", sums(9), options=options)
    assert (report.dataset.name, report.headline.score, report.headline.n) == ("doubles", pytest.approx(1 / 3), 3)
    assert report.metric("reward/repetition").score == 0
    assert report.extraction is not None
    assert report.extraction.rules["numeric_answer"].endswith(" v2")


def test_held_out_may_be_headed_by_the_mean_reward(tmp_path):
    report = held_out(tmp_path, "none", sums(4), options={"metric": "reward"})
    assert (report.headline.name, report.headline.score, report.headline.share) == ("reward", -0.5, False)


def test_held_out_asks_as_training_does(tmp_path):
    surroundings = replace(
        context(sums(1), rewards=(RewardConfig(name="trial_exact"),)),
        prompt=PromptConfig(system="Add.", template="Q {prompt}"),
    )
    policy = speaker("3", tmp_path)
    report = evaluate(policy, config("held_out"), context=surroundings, directory=tmp_path / "r", generate=speak)
    assert read_items(tmp_path / "r")[0].prompt == "system: Add.\nuser: Q What is 3 + 0?\nassistant: "
    assert (report.prompt.system, report.prompt.template, report.prompt.chat) == ("Add.", "Q {prompt}", True)
    assert report.prompt.chat_template_sha256 is not None


def test_the_system_message_of_a_chat_is_the_one_that_is_reported(tmp_path):
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 0?"})
    surroundings = context(
        [Example("chat", "What is 3 + 0?", turns, answer="3")],
        rewards=(RewardConfig(name="trial_exact"),),
        prompt=PromptConfig(system="Add."),
    )
    policy, folder = speaker("3", tmp_path), tmp_path / "r"
    report = evaluate(policy, config("held_out"), context=surroundings, directory=folder, generate=speak)
    assert (report.prompt.system, report.prompt.multi_turn) == ("Be brief.", False)
    assert read_items(folder)[0].prompt == "system: Be brief.\nuser: What is 3 + 0?\nassistant: "


def test_held_out_without_rewards_is_refused_before_anything_is_drawn(tmp_path):
    def never(*_: Any, **__: Any) -> list[Completion]:
        raise AssertionError("drew a completion")

    with pytest.raises(ValueError, match="judges by the experiment's rewards; it has none"):
        evaluate(
            speaker("", tmp_path), config("held_out"), context=context(sums(1)), directory=tmp_path, generate=never
        )


def test_a_reward_that_the_experiment_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"decided_by: no reward 'format'; there are \['trial_bonus', 'trial_exact'\]"):
        held_out(tmp_path, "1", sums(1), options={"decided_by": "format"})


def test_a_report_holds_no_nan(tmp_path):
    evaluate(speaker("1", tmp_path), config("echo"), context=context(sums(1)), directory=tmp_path / "r", generate=speak)
    data = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(metric["score"]) for metric in data["metrics"])
