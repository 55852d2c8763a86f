import hashlib
import json
import re

import pytest

from configs.schema import PromptConfig
from pipeline.evaluation.base import Output, Problem, parse_options
from pipeline.evaluation.drawing import cut_at_stop
from pipeline.evaluation.gsm8k import COT_STRICT
from pipeline.evaluation.report_files import read_items
from pipeline.evaluation.rows import HUB, Rows
from pipeline.evaluation.run import check_evaluation, evaluate
from pipeline.evaluation.worked_examples import WORKED_EXAMPLES
from rewards.answers import extract_answer
from rewards.base import Example
from tests.pipeline.evaluating import SHARED, config, context, speak, speaker

VECTORS = SHARED / "vectors" / "gsm8k_extraction.json"
GSM8K = SHARED / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K at {GSM8K}")

ANN = Example("ann", "Ann has 3 apples and buys 4. How many has she?", answer="3 + 4 = <<3+4=7>>7.\n#### 7")
PERCENT = Example("percent", "What percentage of 20 is 5?", answer="#### 25")


def run(tmp_path, completion, examples=(ANN,), train=(), prompt=None, **fields):
    options = {"protocol": "experiment"} | fields.pop("options", {})
    run_config = config("gsm8k", options=options, **fields)
    surroundings = context(examples, train=train, prompt=prompt)
    report = evaluate(
        speaker(completion, tmp_path), run_config, context=surroundings, directory=tmp_path / "r", generate=speak
    )
    return report, read_items(tmp_path / "r")


def scores(tmp_path, completion, **fields):
    _, items = run(tmp_path, completion, **fields)
    return {name: items[0].scores[name] for name in ("robust", "strict", "flexible", "unparseable")}


@pytest.mark.parametrize(
    ("completion", "robust", "strict", "flexible", "unparseable"),
    [
        ("3 + 4 = 7.\n#### 7", 1, 1, 1, 0),
        ("The answer is 7.00", 1, 0, 0, 0),
        (r"So \boxed{7} apples.", 1, 0, 1, 0),
        ("#### 7 or 8", 0, 1, 0, 1),
        ("#### 8\nWait, that is wrong: #### 7", 1, 0, 1, 0),
        ("<think>#### 7", 0, 1, 1, 1),
        ("She has none.", 0, 0, 0, 1),
    ],
)
def test_three_scores_stand_side_by_side(tmp_path, completion, robust, strict, flexible, unparseable):
    found = scores(tmp_path, completion)
    assert found == {"robust": robust, "strict": strict, "flexible": flexible, "unparseable": unparseable}


def test_a_completion_without_an_answer_is_counted_with_its_reason(tmp_path):
    report, items = run(tmp_path, "She has none.")
    assert (report.counts.unparseable, report.metric("unparseable").score) == (1, 1.0)
    assert items[0].samples[0].error == "no answer is stated"
    assert items[0].samples[0].extracted == {"robust": None, "strict": None, "flexible": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7.\n#### 7\nAs a check, 7 - 4 is", "7"),
        ("3 + 4 = 7.\n#### 7", None),
        ("3 + 4 = 7 apples.\nThen she eats 2, which", None),
    ],
    ids=[
        "a finished line counts",
        "a marker on the line that was cut does not",
        "a last number without marker does not",
    ],
)
def test_a_cut_completion_has_an_answer_only_on_a_finished_line(text, value):
    assert extract_answer(text, truncated=True).value == value


def test_percent_is_not_held_against_an_answer_when_the_question_asks_for_it(tmp_path):
    assert scores(tmp_path, "#### 25%", examples=(PERCENT,))["robust"] == 1
    assert scores(tmp_path, "#### 7%")["robust"] == 0


def test_the_majority_of_the_samples_is_scored_beside_their_mean(tmp_path):
    told = iter(["#### 8", "#### 7", "none", "#### 7.0", "#### 8"])
    report, items = run(tmp_path, lambda prompt, seed: next(told), samples=5, temperature=1.0, options={"k": [1, 4, 5]})
    # Votes 8, 7, -, 7, 8: of four, 7 wins; of five it is a tie, which 8 wins by coming first.
    found = {name: items[0].scores[name] for name in ("robust", "maj@1", "maj@4", "maj@5", "pass@1", "pass@4")}
    assert found == {"robust": 0.4, "maj@1": 0, "maj@4": 1, "maj@5": 0, "pass@1": pytest.approx(0.4), "pass@4": 1}
    assert report.metric("maj@4").n == 1


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match=r"k: \[8\] of 2 samples; raise samples"):
        check_evaluation(config("gsm8k", samples=2, temperature=1.0, options={"k": [1, 8]}))


def test_the_headline_may_be_lm_evals(tmp_path):
    report, _ = run(tmp_path, "The answer is 7.", options={"headline": "strict"})
    assert (report.headline.name, report.headline.score, report.metric("robust").score) == ("strict", 0, 1)


def test_zero_shot_chat_states_the_format_that_is_read(tmp_path):
    report, items = run(tmp_path, "#### 7", options={"protocol": "zero_shot_chat"})
    assert items[0].prompt.startswith("user: Ann has 3 apples")
    assert items[0].prompt.endswith("in the form\n#### <number>\nassistant: ")
    assert (report.prompt.chat, report.generation.stop) == (True, ())


def test_the_experiments_own_prompt_is_used_where_asked(tmp_path):
    _, items = run(tmp_path, "#### 7", prompt=PromptConfig(chat=False, template="Q {prompt} A"))
    assert items[0].prompt == "Q Ann has 3 apples and buys 4. How many has she? A"


# ---- few-shot protocols --------------------------------------------------------------------------------------------


def worked(count):
    return [Example(f"t{i}", f"How much is {i} + 1?", target=f"It is {i + 1}.\n#### {i + 1}") for i in range(count)]


def test_five_worked_examples_of_the_train_split_stand_before_the_question(tmp_path):
    report, items = run(
        tmp_path, " 7\n#### 7\n\nQuestion: What", train=worked(9), options={"protocol": "completion_5shot"}
    )
    prompt, shots = items[0].prompt, items[0].few_shot_ids
    assert len(set(shots)) == 5
    assert prompt.startswith(f"Question: How much is {shots[0][1:]} + 1?\nAnswer: It is ")
    assert prompt.endswith("\n\nQuestion: Ann has 3 apples and buys 4. How many has she?\nAnswer:")
    assert items[0].samples[0].text == " 7\n#### 7\n\n"
    assert (report.prompt.few_shot, report.prompt.few_shot_seed, report.prompt.chat) == (5, 1234, False)
    assert any("not lm-eval's" in note for note in report.task.notes)


def test_another_seed_draws_other_examples(tmp_path):
    def shots(seed):
        options = {"protocol": "completion_5shot", "few_shot_seed": seed}
        return run(tmp_path, "7", train=worked(50), options=options)[1][0].few_shot_ids

    assert shots(1) == shots(1) != shots(2)


def test_five_shots_without_worked_solutions_are_refused(tmp_path):
    bare = [Example(f"t{i}", "How much?", answer="7") for i in range(9)]
    with pytest.raises(ValueError, match="example 't0': completion_5shot shows worked solutions"):
        run(tmp_path, "7", train=bare, options={"protocol": "completion_5shot"})
    with pytest.raises(ValueError, match="draws 5 worked examples, and the experiment's dataset has 2"):
        run(tmp_path, "7", train=worked(2), options={"protocol": "completion_5shot"})


@needs_gsm8k
@pytest.mark.parametrize(
    ("place", "sha256"),
    # Made by lm-eval 0.4.13 itself: task gsm8k, version 3, fewshot seed 1234, contexts of documents 0, 1 and 1318.
    [
        (0, "32680f263ba83280e98a8a24ceefed10a722a4cdcd9f4d78e93c45d43143ca66"),
        (1, "e6b9a0195411932e5323ed20ad05e965b08b979103bbb26594a5bdf123d27990"),
        (1318, "c9c63955e0cf2185cb505fbc69b80561f7bad5c30a5daee94cc851b31107f4cb"),
    ],
)
def test_the_five_shot_prompts_are_lm_evals_byte_for_byte(lm_eval_problems, place, sha256):
    prompt = lm_eval_problems[place].example.prompt
    assert hashlib.sha256(prompt.encode()).hexdigest() == sha256


@pytest.fixture(scope="module")
def lm_eval_problems():
    files = {"path": str(GSM8K / "gsm8k_test.jsonl"), "train_path": str(GSM8K / "gsm8k_train.jsonl")}
    run_config = config("gsm8k", max_tokens=256, options={"protocol": "completion_5shot", **files})
    cls, options = parse_options(run_config)
    evaluator = cls(options, run_config, context())
    evaluator.prepare()
    assert evaluator.notes == ()
    assert evaluator.dataset().sha256 == "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
    return evaluator.problems()


@needs_gsm8k
def test_every_gold_answer_of_the_test_split_is_a_number(lm_eval_problems):
    golds = [problem.reference for problem in lm_eval_problems]
    assert len(golds) == 1319
    assert sum("," in gold for gold in golds) == 14
    assert [place for place, gold in enumerate(golds) if gold.startswith("-")] == [489, 1113]


def test_the_own_worked_examples_lead_to_their_answers():
    assert len(WORKED_EXAMPLES) == 8
    answers = [extract_answer(solution).value for _, solution in WORKED_EXAMPLES]
    assert answers == ["75", "15", "90", "18", "220", "53", "18", "42"]


def test_chain_of_thought_has_its_own_stop_strings_and_strict_rule(tmp_path):
    report, items = run(tmp_path, " 3 + 4 is 7. The answer is 7.\n\nQ: What", options={"protocol": "cot_8shot_own"})
    assert items[0].prompt.startswith("Q: A beekeeper has 6 hives.")
    assert items[0].prompt.endswith("The answer is 42.\n\nQ: Ann has 3 apples and buys 4. How many has she?\nA:")
    assert items[0].samples[0].text == " 3 + 4 is 7. The answer is 7.\n\n"
    assert report.metric("strict").score == 1
    assert report.extraction is not None
    assert report.extraction.rules["strict"] == COT_STRICT
    assert report.prompt.few_shot == 8


def test_lm_evals_chain_of_thought_rule_has_its_dot(tmp_path):
    # Its pattern ends in any character: at the end of a text that eats the last digit.
    found = scores(tmp_path, "The answer is 17", options={"protocol": "cot_8shot_own"})
    assert (found["strict"], found["robust"]) == (0, 0)
    seventeen = Example("s", "How many?", answer="#### 17")
    found = scores(tmp_path, "The answer is 17", examples=(seventeen,), options={"protocol": "cot_8shot_own"})
    assert (found["strict"], found["robust"]) == (0, 1)
    found = scores(tmp_path, "The answer is 17.", examples=(seventeen,), options={"protocol": "cot_8shot_own"})
    assert (found["strict"], found["robust"]) == (1, 1)


@pytest.mark.skipif(not VECTORS.is_file(), reason=f"no {VECTORS}")
def test_the_chain_of_thought_rule_agrees_with_lm_eval_on_every_case():
    run_config = config("gsm8k", options={"protocol": "cot_8shot_own"})
    cls, options = parse_options(run_config)
    evaluator = cls(options, run_config, context())
    cases = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 80
    for case in cases:
        text = cut_at_stop(case["output"], evaluator.stop)
        problem = Problem(Example("q", "?"), PromptConfig(), case["gold"], data={"question": case["question"]})
        grade = evaluator.grade(problem, [Output(text, "end", ())]).grades[0]
        theirs = case["lm_eval"]["gsm8k_cot/strict-match"]
        assert (grade.extracted["strict"] or "[invalid]") == theirs["extracted"], case["id"]
        assert grade.scores["strict"] == theirs["exact_match"], case["id"]


def test_chain_of_thought_with_other_examples_takes_them_from_a_file(tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text(json.dumps({"question": "One?", "target": "The answer is 1."}) + "\n", encoding="utf-8")
    _, items = run(tmp_path, "7", options={"protocol": "cot_8shot", "shots_path": str(file)})
    assert items[0].prompt == "Q: One?\nA: The answer is 1.\n\nQ: Ann has 3 apples and buys 4. How many has she?\nA:"
    with pytest.raises(ValueError, match="shots_path: goes with protocol: cot_8shot"):
        check_evaluation(config("gsm8k", options={"protocol": "cot_8shot"}))


# ---- data that is not as it should be ------------------------------------------------------------------------------


def test_a_missing_file_is_named_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation 'gsm8k': options.path: no such file: .*nowhere.jsonl"):
        run(tmp_path, "7", options={"path": str(tmp_path / "nowhere.jsonl")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "One?", "answer": "#### 1"}\n{"question": "Two?"}\n', r"test.jsonl:2: has no answer"),
        ('{"question": "One?", "answer"\n', r"test.jsonl:1: not JSON"),
        ("[1]", r"row 1: expected an object, got int"),
        ("\n\n", "no rows"),
        ('{"question": "One?", "answer": "#### one"}\n', "gold answer ' one': not one number"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "test.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "1", options={"path": str(file)})


@pytest.mark.parametrize("name", HUB)
def test_a_dataset_of_the_hub_is_read_at_a_pinned_commit(name):
    rows = Rows(name, "main", "test")
    rows.check("options.path")
    assert re.fullmatch(r"[0-9a-f]{40}", rows.revision or "")
    with pytest.raises(
        ValueError, match=r"options.path: no such file: .*openai/gsm9k \(datasets of the hub: openai/gsm8k"
    ):
        Rows("openai/gsm9k", "main", "test").check("options.path")
