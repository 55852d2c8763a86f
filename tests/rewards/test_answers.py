import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.answers import RULES, Extraction, Mode, canonical_gold, extract_answer, gsm8k_gold, is_correct

SHARED = Path(__file__).parents[2] / ".." / "shared"
VECTORS = SHARED / "vectors" / "gsm8k_extraction.json"
GSM8K = SHARED / "data" / "gsm8k" / "gsm8k_test.jsonl"
LM_EVAL: dict[Mode, str] = {"lm_eval_strict": "gsm8k/strict-match", "lm_eval_flexible": "gsm8k/flexible-extract"}


@pytest.fixture(scope="module")
def cases():
    if not VECTORS.exists():
        pytest.skip(f"no vectors at {VECTORS}")
    return json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]


def test_a_careful_reader_agrees_on_every_case(cases):
    disagreed = [case["id"] for case in cases if is_correct(case["output"], case["gold"]) != case["human"]["correct"]]
    assert disagreed == []


@pytest.mark.parametrize("mode", LM_EVAL)
def test_lm_eval_agrees_on_every_case(cases, mode):
    for case in cases:
        expected = case["lm_eval"][LM_EVAL[mode]]
        assert (extract_answer(case["output"], mode).value or "[invalid]") == expected["extracted"], case["id"]
        assert is_correct(case["output"], case["gold"], mode) == bool(expected["exact_match"]), case["id"]


def fastest(work, clock):
    """Seconds of the best of three runs."""

    def seconds():
        start = clock()
        work()
        return clock() - start

    return min(seconds() for _ in range(3))


def test_a_case_takes_less_than_50_ms(cases):
    def read(case):
        return lambda: is_correct(case["output"], case["gold"])

    assert max(fastest(read(case), time.perf_counter) for case in cases) < 0.05


ANSWERS = [
    ("#### 18", "18", "hash"),
    ("####18####", "18", "hash"),
    ("#### 18. That is because 16 - 7 = 9", "18", "hash"),
    ("#### - 10", "-10", "hash"),
    ("#### -$10.00", "-10", "hash"),
    ("#### $-10", "-10", "hash"),
    ("#### negative 10", "-10", "hash"),
    ("#### $57,500.00 per year", "57500", "hash"),
    ("#### US$57,500", "57500", "hash"),
    ("#### 1\u00a0450\u202f000", "1450000", "hash"),
    ("#### $1.45 million", "1450000", "hash"),
    ("#### 57.5k", "57500", "hash"),
    ("#### $5.75 \\times 10^{4}$", "57500", "hash"),
    ("#### 5.75 × 10⁴", "57500", "hash"),
    ("#### .50", "0.5", "hash"),
    ("#### -0.00", "0", "hash"),
    ("#### 25 %", "25%", "hash"),
    ("#### 18 m²", "18", "hash"),
    ("#### 18/day", "18", "hash"),
    ("#### **$18**", "18", "hash"),
    ("#### <18>", "18", "hash"),
    ("#### 9*2 = <<9*2=18>>18", "18", "hash"),
    ("#### 18 (9 eggs at $2 each)", "18", "hash"),
    ("#### Step 1\n16-7 = 9\n#### Step 2\n9*2 = 18, so \\boxed{18}", "18", "boxed"),
    ("\\boxed{57{,}500}", "57500", "boxed"),
    ("\\boxed{57\\,500}", "57500", "boxed"),
    ("\\boxed{\\text{She makes } \\$18 \\text{ a day}}", "18", "boxed"),
    ("\\boxed{\\boxed{18}}", "18", "boxed"),
    ("\\boxed{(18)}", "18", "boxed"),
    ("\\boxed{9} are left, then \\boxed{9 \\times 2 = 18}", "18", "boxed"),
    ("\\boxed{\\dfrac{36}{2}}", "18", "boxed"),
    ("<answer>9 eggs are left. She makes $18.</answer>", "18", "answer_tag"),
    ("<answer>18", "18", "answer_tag"),
    ("The answer is **$18** per day. I hope it is correct.", "18", "answer_phrase"),
    ("The answer is:\n\n\\[ 18 \\]", "18", "answer_phrase"),
    ("The answer is 18, not 20.", "18", "answer_phrase"),
    ("The answer is 18 because 20 - 2 = 18.", "18", "answer_phrase"),
    ("The answer is 18. The answer is $18.00.", "18", "answer_phrase"),
    ('{"answer": "18"}', "18", "answer_phrase"),
    ("## Final Answer\n\n18 dollars", "18", "answer_phrase"),
    ("Answer: 16 - 7 = 9 eggs are left. She makes 9 * 2 = $18.", "18", "sentence"),
    ("She sells 9 eggs at $2 each, so she makes $18.", "18", "sentence"),
    ("After selling 9 eggs, Janet makes $18 (at $2 each). Let me know if you have questions!", "18", "sentence"),
    ("The answer is not 20. She makes $18.", "18", "sentence"),
    ("Mrs. Smith pays Rs. 18", "18", "sentence"),
    ("In all:\n- 18", "18", "sentence"),
]


@pytest.mark.parametrize(("text", "value", "rule"), ANSWERS)
def test_a_committed_answer_is_read(text, value, rule):
    assert extract_answer(text) == Extraction(value, rule, None)


REFUSED = [
    *("#### 18 or 20", "#### 18 (or 20)", "#### at least 18", "#### more than 18", "#### 18?", "#### 18+", "#### < 18"),
    *("#### 18-20", "#### 18 to 20", "#### 18 ± 2", "#### 18, 20", "#### 18; 20", "#### 16 17 18", "#### 18/20"),
    *("#### 575,00", "#### 57,50", "#### 1,45,000", "#### 18.0.1", "#### 0x18", "#### 18:20", "#### 18_000"),
    *("#### 9*9", "#### 9(2)", "#### 9**2", "#### 18²", "#### 18½", "#### 18 and a half", "#### $18 and 50 cents"),
    *("#### nan", "#### -inf", "#### 1e5000", "#### " + "1" * 31, "#### XVIII", "#### ", "#### ..."),
    *("#### 18\n#### 20", "\\boxed{18} or \\boxed{20}", "<answer>18</answer><answer>20</answer>"),
    *("\\boxed{x = 18, y = 20}", "\\boxed{\\sqrt{18}}", "\\boxed{18\\pi}", "\\boxed{\\frac{1}{3}}", "\\boxed{18x}"),
    *("Maybe the answer is 18.", "The answer is not 18.", "The answer isn't 18.", "The answer is between 16 and 18."),
    *("The answer is 16. The answer is 18.", "I don't know if the answer is 18.", "The answer is", "The answer is 18?"),
    *(
        "84 / 12 =",
        "She makes 9*2",
        "16, 17, 18",
        "Step 18",
        "She sells 18,",
        "She sells 18 because 9 are left, so 9.",
        "x = 18, y = 20",
        "",
        " \n",
        "I cannot tell.",
    ),
    *("<think>so #### 18", "<think>18</think>", "</think>18<think>", "<reasoning>\\boxed{18}"),
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_commits_to_no_number_has_a_reason_instead_of_a_value(text):
    found = extract_answer(text)
    assert found.value is None
    assert found.reason


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 20\nWait, that is wrong: 9*2 = 18.", "18"),
        ("#### 20\nWait, I forgot some.\n#### 18", "18"),
        ("The answer is 20. Actually no, it is 18.", "18"),
        ("#### 18\nWait, let me check: 9*2 = 18. Yes.", "18"),
        ("#### 18\nBecause 16 - 7 = 9 and 9 * 2 = 18.", "18"),
        ("#### 18\nWait, that is wrong.", None),
        ("#### 18\nActually, she makes 90 in a week.", None),
    ],
)
def test_an_explicit_correction_replaces_or_withdraws_an_answer(text, value):
    assert extract_answer(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "#### 18<|im_end|>\n<|im_start|>assistant\n#### 10",
        "#### 18</s>#### 10",
        "<s>#### 18<|eot_id|>#### 10",
        "#### 18\n\nQuestion: 5+5?\nAnswer: #### 10",
        "#### 18 Question: 5+5? #### 10",
        "<think>#### 10</think>#### 18",
        "16 eggs, </think> <think>#### 10</think> so #### 18\n\n**Q:** next\n#### 3",
        "Question: 16 eggs, 7 eaten, $2 each?\n#### 18",
    ],
)
def test_only_the_answering_part_of_a_text_counts(text):
    assert extract_answer(text).value == "18"


def test_a_reward_can_demand_one_format():
    assert extract_answer("The answer is 18.", rules=("hash",)).value is None
    assert extract_answer("\\boxed{18}\n#### 20", rules=("boxed",)).value == "18"
    assert {rule for _, _, rule in ANSWERS} == set(RULES)


@pytest.mark.parametrize(("mode", "rules"), [("flexible", None), ("robust", ("hashes",))])
def test_an_unknown_mode_or_rule_is_an_error(mode, rules):
    with pytest.raises(ValueError, match="modes are"):
        extract_answer("#### 18", mode, rules=rules)


def test_equality_is_of_numbers_and_not_of_digits_that_agree():
    assert is_correct("#### 57,500.00", "57500")
    assert is_correct("#### 0.10", ".1")
    assert not is_correct("#### 1,450,004", "1,450,000")
    assert not is_correct("#### 18.001", "18")
    assert not is_correct("#### -18", "18")
    assert not is_correct("#### 18 thousand", "18")


def test_a_percentage_equals_a_plain_gold_only_where_the_question_asks_for_one():
    assert not is_correct("#### 25%", "25")
    assert is_correct("#### 25%", "25", question="What percentage of 20 is 5?")
    assert is_correct("#### 25%", "25%")
    assert not is_correct("#### 20%", "25", question="What percentage of 20 is 5?")


@pytest.mark.parametrize(
    ("gold", "value"), [("2,125", "2125"), ("-10", "-10"), ("$18.50", "18.5"), (" 1,450,000 ", "1450000")]
)
def test_a_gold_answer_is_one_number(gold, value):
    assert canonical_gold(gold) == value


@pytest.mark.parametrize(
    "gold", ["", "18 or 20", "18-20", "eighteen", "575,00", "nan", "#### 18", "9" * 31, "9" * 10_000]
)
def test_an_unreadable_gold_is_an_error_before_anything_is_judged(gold):
    with pytest.raises(ValueError, match="gold answer"):
        canonical_gold(gold)
    with pytest.raises(ValueError, match="gold answer"):
        is_correct("#### 18", gold)


def test_the_gold_of_a_gsm8k_row_follows_its_marker():
    assert gsm8k_gold("2+1 = <<2+1=3>>3\n#### 2,125") == "2,125"
    for broken in ("2+1 = 3", "### 3", "#### three"):
        with pytest.raises(ValueError):
            gsm8k_gold(broken)


def test_every_gsm8k_solution_answers_its_own_question():
    if not GSM8K.exists():
        pytest.skip(f"no data at {GSM8K}")
    solutions = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    assert len(solutions) == 1319
    for solution in solutions:
        assert is_correct(solution, gsm8k_gold(solution))
        assert is_correct(solution, gsm8k_gold(solution), "lm_eval_strict")


PIECES = (
    "#### |\\boxed{|\\frac{1}{0}|<answer>|</answer>|the answer is |so |because |<think>|</think>|Wait, |no, |Question:"
    "|1e999|½|²|١|\u2212|\x00|\ud800| million| 000|,000|0|1|9|.|,|-|$|%|{|}|(|)|=|*|/|^|_|'|\"|<|>| |\n"
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES.split("|")), max_size=30).map("".join)))
def test_no_text_raises_and_a_value_is_its_own_gold(text):
    for mode in LM_EVAL:
        is_correct(text, "18", mode)
    found = extract_answer(text)
    assert (found.value is None) == (found.reason is not None)
    if found.value is not None:
        assert found.rule in RULES
        assert canonical_gold(found.value) == found.value


LONG = (
    "#### |\\boxed{|{|<answer>|answer is |Answer:\n|or |1|1,|1,000|1 000 | |\n|Wait, |no.\n|(|<|<<|=|\\|'|*|_|\nQ|$|-"
    "|9^{|½|Mr. |?! |because 1 so |\u200b"
)


@pytest.mark.parametrize("piece", LONG.split("|"))
def test_time_grows_with_the_text_and_not_with_its_square(piece):
    text = "#### 18\n" + piece * (100_000 // len(piece))

    def read():
        is_correct(text, "18")
        for mode in LM_EVAL:
            is_correct(text, "18", mode)

    # This thread's time: the process has others, and now and then all its objects are collected.
    assert fastest(read, time.thread_time) < 0.25


def test_of_a_very_long_text_the_end_is_read_and_open_thoughts_are_remembered():
    long = "Then 3 is added. " * 5_000
    assert is_correct(long + "\n#### 18", "18")
    assert not is_correct("<think>" + long + "\n#### 18", "18")
    assert is_correct("<think>" + long + "</think>\n#### 18", "18")
    assert is_correct("<think>hm</think>" + long + "\n#### 18", "18")


def test_an_extraction_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        extract_answer("#### 18").value = "20"  # pyright: ignore[reportAttributeAccessIssue]
