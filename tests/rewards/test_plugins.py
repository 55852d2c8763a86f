import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from configs.registry import load_plugins
from configs.schema import RewardConfig
from configs.strict_yaml import parse_yaml
from rewards import Example, RewardComposer, RewardRegistry
from rewards.composer import build_reward
from rewards.reasoning_gym import stated_answer
from rewards.verifier_guard import ANSWERS, is_algebra, is_arithmetic, is_literal, may_verify

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


def score(name, completion, options=None, **columns):
    reward = build_reward(RewardConfig(name=name, options=options or {}))
    (only,) = reward(["p"], [completion], **{column: [value] for column, value in columns.items()})
    return cast(Any, only)


def refusal(name, **options):
    with pytest.raises(ValueError) as caught:
        build_reward(RewardConfig(name=name, options=options))
    assert repr(name) in str(caught.value) or "function" in str(caught.value)
    return str(caught.value)


OURS = (
    "code_tests",
    "format",
    "json_schema",
    "length",
    "math_verify",
    "numeric_answer",
    "python",
    "reasoning_gym",
    "regex",
    "repetition",
)


@pytest.mark.parametrize("name", OURS)
def test_every_reward_and_each_of_its_options_is_documented(name):
    text = DOCS.read_text(encoding="utf-8")
    options = RewardRegistry[name].Options.model_fields
    assert f"`{name}`" in text
    assert [o.alias or n for n, o in options.items() if f"`{o.alias or n}`" not in text] == []


def test_the_examples_of_the_documentation_are_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = DOCS.read_text(encoding="utf-8")
    python, plugin = re.findall(r"```python\n# my_rewards\.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(python, encoding="utf-8")
    (tmp_path / "plugin.py").write_text(plugin, encoding="utf-8")
    load_plugins(["plugin.py"], tmp_path)
    lists = [parse_yaml(block)["rewards"] for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    composers = [RewardComposer.from_config([RewardConfig(**reward) for reward in rewards]) for rewards in lists]
    assert len(composers) == 6
    columns = {"answer": ["5"] * 3, "truncated": [False, False, True], "completion_length": [20, 6, 256]}
    completions = ["<think>2 + 3 = 5</think><answer>5</answer>", "The answer is 5.", "5 5 5 5 5 5"]
    scores = composers[0](["What is 2 + 3?"] * 3, completions, columns | {"max_completion_length": [256] * 3})
    for completion, score in zip(completions, scores, strict=True):
        cells = " | ".join(f"{part:g}" for part in score.parts.values())
        assert f"| `{completion}` | {cells} | {score.total:.1f} |" in text


# ---- numeric_answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"), [("24 + 7 = 31\n#### 31", 1.0), ("#### 1,031", 0.0), ("31 or 32", 0.0), ("", 0.0)]
)
def test_the_last_number_that_a_completion_commits_to_is_compared(completion, expected):
    assert score("numeric_answer", completion, answer="31") == expected


def test_the_answer_may_be_a_whole_gsm8k_solution():
    solution = "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"
    assert score("numeric_answer", "The answer is $18.00.", answer=solution) == 1.0
    assert score("numeric_answer", "The answer is 9.", answer=solution) == 0.0


def test_a_mode_of_lm_eval_reads_as_lm_eval_does():
    strict, flexible = {"mode": "lm_eval_strict"}, {"mode": "lm_eval_flexible"}
    assert score("numeric_answer", "The answer is 18.", strict, answer="18") == 0.0
    assert score("numeric_answer", "The answer is 18.", flexible, answer="18") == 1.0


def test_rules_pay_only_for_the_format_that_was_asked_for():
    assert score("numeric_answer", "The answer is 18.", {"rules": ["hash"]}, answer="18") == 0.0
    assert score("numeric_answer", "#### 18.0", {"rules": ["hash"]}, answer="18") == 1.0
    assert "expected some of ['hash'" in refusal("numeric_answer", rules=["hush"])
    assert "leave them out" in refusal("numeric_answer", mode="lm_eval_strict", rules=["hash"])


def test_right_and_wrong_have_the_configured_values():
    options = {"correct": 0.5, "incorrect": -0.5}
    assert score("numeric_answer", "#### 3", options, answer="3") == 0.5
    assert score("numeric_answer", "#### 4", options, answer="3") == -0.5


@pytest.mark.parametrize("answer", [None, "", "about four", "#### ", "1 or 2"])
def test_an_answer_that_is_not_one_number_is_refused_before_training(answer):
    reward = build_reward(RewardConfig(name="numeric_answer"))
    with pytest.raises(ValueError, match="example 'ex-7'"):
        reward.validate([Example("ex-7", "p", answer=answer)])


def test_the_question_and_a_cut_count_as_in_the_benchmark():
    reward = build_reward(RewardConfig(name="numeric_answer"))
    prompts, answer = ["What percentage is it?", "How many are there?"], ["25", "25"]
    assert reward(prompts, ["#### 25%", "#### 25%"], answer=answer) == [1.0, 0.0]
    completions = ["The answer is 25.\nFor", "It is 25"]
    assert reward(prompts, completions, answer=answer, truncated=[True, True]) == [1.0, 0.0]


def test_a_dataset_without_answers_is_a_fault_and_not_a_score():
    with pytest.raises(ValueError, match="needs the column 'answer'; the batch has \\['task'\\]"):
        score("numeric_answer", "#### 3", task="t")


# ---- format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1.0),
        ("  <think>\n2 + 2\n</think>\n\n<answer>4</answer>\n", 1.0),
        ("<think>a < b <i>x</i></think><answer>4</answer>", 1.0),
        ("Well, <think>2 + 2</think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think> so <answer>4</answer>", 0.0),
        ("<think>2 + 2</think><answer>4</answer> Done.", 0.0),
        ("<answer>4</answer><think>2 + 2</think>", 0.0),
        ("<think>2 + 2</think><answer>4", 0.0),
        ("<think>2</think><think>2</think><answer>4</answer>", 0.0),
        ("<think>2<answer>3</answer></think><answer>4</answer>", 0.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<think>2</think><answer> \n</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_the_blocks_must_be_the_whole_completion_once_and_in_order(completion, expected):
    assert score("format", completion) == expected


def test_a_truncated_completion_has_no_format():
    assert score("format", "<think>2</think><answer>4</answer>", truncated=True) == 0.0
    assert score("format", "<think>2</think><answer>4</answer>", truncated=False) == 1.0


def test_a_prompt_may_open_the_first_block():
    assert score("format", "2 + 2</think><answer>4</answer>", {"opened": True}) == 1.0
    assert score("format", "<think>2 + 2</think><answer>4</answer>", {"opened": True}) == 0.0


def test_tags_are_names_and_differ():
    assert score("format", "<a-b>x</a-b>", {"tags": ["a-b"], "correct": 0.1}) == 0.1
    assert "tags" in refusal("format", tags=["<think>"])
    assert "twice" in refusal("format", tags=["a", "a"])
    assert "tags" in refusal("format", tags=[])


# ---- length and repetition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "expected"), [(60, 0.0), (80, 0.0), (90, -0.5), (100, -1.0)])
def test_length_is_punished_near_the_limit_that_completions_are_sampled_with(length, expected):
    columns = {"completion_length": length, "max_completion_length": 100}
    assert score("length", "x", {"cache": 20}, **columns) == pytest.approx(expected)


def test_a_limit_of_its_own_replaces_that_of_the_sampler():
    columns = {"completion_length": 45, "max_completion_length": 100}
    assert score("length", "x", {"cache": 20, "max_length": 50}, **columns) == pytest.approx(-0.75)
    assert "more than max_length" in refusal("length", cache=20, max_length=10)
    with pytest.raises(ValueError, match="needs the column 'completion_length'"):
        score("length", "x", {"cache": 20})


def test_repeated_words_cost_their_share():
    # the cat, cat the, the cat, cat sat: one of four pairs is a repetition.
    assert score("repetition", "The cat the CAT sat", {"ngram": 2, "max_penalty": -0.8}) == pytest.approx(-0.2)
    assert score("repetition", "one two three") == 0.0
    assert "less than 0" in refusal("repetition", max_penalty=0.5)


# ---- regex ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "completion", "expected"),
    [
        ("anywhere", "x #### 7", 1.0),
        ("start", "x #### 7", 0.0),
        ("start", "#### 7 x", 1.0),
        ("whole", "#### 7 x", 0.0),
        ("whole", "#### 7", 1.0),
    ],
)
def test_a_pattern_matches_the_configured_part(where, completion, expected):
    assert score("regex", completion, {"pattern": r"#### \d+", "where": where}) == expected


def test_a_pattern_that_does_not_compile_is_refused_with_its_field():
    assert "pattern: not a regular expression" in refusal("regex", pattern="(")


# ---- json_schema ---------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 2},
        "home": {"anyOf": [{"type": "null"}, {"type": "object", "required": ["city"]}]},
        "kind": {"const": 1},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ann", "age": 0, "tags": []}', 1.0),
        ('{"name": "Ann", "age": 149, "tags": [1, "a"]}', 1.0),
        (' {"name": "Ann", "age": 3.0, "tags": ["a", 1.0], "home": null, "kind": 1} \n', 1.0),
        ('{"name": "Ann", "home": {"city": 1, "more": []}}', 1.0),
        ('{"name": "Ann", "home": {}}', 0.5),
        ('{"name": "ann"}', 0.5),
        ('{"name": ""}', 0.5),
        ('{"age": 3}', 0.5),
        ('{"name": "Ann", "age": 150}', 0.5),
        ('{"name": "Ann", "age": -1}', 0.5),
        ('{"name": "Ann", "age": 3.5}', 0.5),
        ('{"name": "Ann", "age": true}', 0.5),
        ('{"name": "Ann", "tags": ["a", 1, "a"]}', 0.5),
        ('{"name": "Ann", "tags": [true]}', 0.5),
        ('{"name": "Ann", "kind": true}', 0.5),
        ('{"name": "Ann", "shoe": 1}', 0.5),
        ("[]", 0.5),
        ('{"name": "Ann"', 0.0),
        ('{"name": NaN}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 5000, 0.0),
        ('Here: {"name": "Ann"}', 0.0),
    ],
)
def test_a_completion_is_compared_with_the_schema(text, expected):
    assert score("json_schema", text, {"schema": PERSON, "parsed": 0.5}) == expected


def test_a_deep_value_is_looked_at_no_deeper_than_the_schema():
    deep = '{"name": "Ann", "home": {"city": ' + "[" * 500 + "]" * 500 + "}}"
    assert score("json_schema", deep, {"schema": PERSON}) == 1.0


def test_the_last_fenced_block_may_be_the_value():
    text = 'First\n```json\n{"name": 1}\n```\nbut rather\n```\n{"name": "Ann"}\n```\n'
    assert score("json_schema", text, {"schema": PERSON, "where": "fence"}) == 1.0
    assert score("json_schema", text, {"schema": PERSON}) == 0.0
    assert score("json_schema", '{"name": "Ann"}', {"schema": PERSON, "where": "fence"}) == 0.0


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"typ": "object"}, "schema.typ: not supported"),
        ({"$ref": "#/a"}, "schema.$ref: not supported"),
        ({"type": "text"}, "schema.type: expected one or a list of"),
        ({"properties": {"a": {"items": {"type": 1}}}}, "schema.properties.a.items.type"),
        ({"anyOf": [{}, {"minimum": "1"}]}, "schema.anyOf.1.minimum: expected a number, got '1'"),
        ({"items": True}, "schema.items: expected a mapping"),
        ({"pattern": "("}, "schema.pattern: expected a regular expression"),
        ({"required": [1]}, "schema.required: expected a list of names"),
        ({"enum": 3}, "schema.enum: expected a list"),
    ],
)
def test_a_schema_that_would_not_mean_what_it_says_is_refused_at_its_place(schema, said):
    assert said in refusal("json_schema", schema=schema)


# ---- python --------------------------------------------------------------------------------------------------------


def letters(prompts, completions, letter="a", **columns):
    return [None if text == "skip" else float(text.count(letter)) for text in completions]


def broken(prompts, completions, **columns):
    raise LookupError("no such thing")


HERE = f"{__name__}:letters"


def test_a_function_scores_and_gets_its_arguments():
    assert score("python", "banana", {"function": HERE}) == 3.0
    assert score("python", "banana", {"function": HERE, "arguments": {"letter": "n"}}) == 2.0
    assert score("python", "skip", {"function": HERE}, task="any") is None


def test_a_function_in_a_file_is_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def half(prompts, completions, id, **columns):\n    return [0.5 for _ in id]\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert score("python", "x", {"function": "./mine.py:half"}, id="a") == 0.5
    assert "FileNotFoundError" in refusal("python", function="./gone.py:half")
    assert "has no attribute 'whole'" in refusal("python", function="./mine.py:whole")


def test_a_fault_names_the_function():
    with pytest.raises(ValueError, match=r"function 'tests\.rewards\.test_plugins:broken': LookupError: no such thing"):
        score("python", "x", {"function": f"{__name__}:broken"})
    assert "expected a function, got str" in refusal("python", function=f"{__name__}:__name__")
    assert "No module named" in refusal("python", function="no_such_module_here:f")
    assert "String should match pattern" in refusal("python", function="math.sqrt")


# ---- reasoning_gym -------------------------------------------------------------------------------------------------


def entry(task, place=0, **options):
    made = reasoning_gym.create_dataset(task, size=place + 1, seed=4, **options)[place]
    return json.loads(json.dumps({**made, "options": options}))


def verified(task, completion, options=None, made=None):
    return score("reasoning_gym", completion, options, task=task, entry=made or entry(task), id="ex-1")


@pytest.mark.parametrize(
    ("where", "completion", "answer"),
    [
        ("auto", "<think>#### 3</think>\n24 + 7 = 31\n#### 31", "31"),
        ("auto", "<answer>30</answer> no: <answer> 31 </answer> #### 32", "31"),
        ("auto", " 31\n", "31"),
        ("auto", "<think>31", None),
        ("hash", "#### 30\n#### 31\nDone.", "31"),
        ("hash", "31", None),
        ("tag", "#### 31", None),
        ("tag", "<answer>31", None),
        ("tag", "<answer>line\nline</answer>", "line\nline"),
        ("whole", "#### 31", "#### 31"),
    ],
)
def test_the_answer_stands_where_the_option_says(where, completion, answer):
    assert stated_answer(completion, where) == answer


def test_a_task_is_judged_by_its_own_verifier():
    made = entry("chain_sum")
    assert verified("chain_sum", f"#### {made['answer']}.0", made=made) == 1.0
    assert verified("chain_sum", "#### 99999", made=made) == 0.0
    countdown = entry("countdown")
    assert verified("countdown", countdown["metadata"]["expression"], made=countdown) == 1.0
    assert verified("countdown", "1 + 1", made=countdown) == 0.05
    assert verified("countdown", "1 + 1", {"partial": False}, made=countdown) == 0.0


def test_every_task_gives_its_own_answer_full_marks_after_a_way_through_json():
    reward = build_reward(RewardConfig(name="reasoning_gym", options={"answer": "whole"}))
    for task in sorted(set(DATASETS) - {"composite", "codeio"}):
        made = entry(task)
        if made["answer"] is not None:
            assert reward(["p"], [made["answer"]], task=[task], entry=[made], id=["x"]) == [1.0], task
        reward.validate([Example("x", made["question"], columns={"task": task, "entry": made})])


@pytest.mark.parametrize("answer", ["", "1/0 ( [ {", "{}", "[[1]]", "9" * 5000, "1.5e99999", "nan", "a b\nc", "("])
def test_a_bad_answer_scores_low_and_never_raises(answer):
    for task in ("boxnet", "coin_flip", "game_of_life", "prime_factorization", "sudoku", "n_queens", "graph_color"):
        assert 0.0 <= verified(task, answer, {"answer": "whole"}) < 1.0


def test_a_task_is_verified_with_the_options_that_made_it():
    # puzzle24 takes no number above its own maximum, which is 10 by default.
    made = entry("puzzle24", max_value=5)
    assert verified("puzzle24", "6 + 6 + 6 + 6", made=made) == 0.01
    assert verified("puzzle24", "6 + 6 + 6 + 6", made=made | {"options": {}}) == 1.0


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "expected the columns task and entry"),
        ({"task": "chain_sum", "entry": "31"}, "expected the columns task and entry"),
        ({"task": "chian_sum", "entry": {"answer": "1", "metadata": {}}}, "'chian_sum' not registered"),
        ({"task": "mini_sudoku", "entry": {"answer": "1", "metadata": {}}}, "fails on the entry's own answer"),
        ({"task": "number_sorting", "entry": {"answer": "print(1)", "metadata": {}}}, "may not be evaluated"),
        ({"task": "chain_sum", "entry": {"answer": "1", "metadata": {}, "options": {"x": 1}}}, "unexpected keyword"),
    ],
)
def test_an_entry_that_its_verifier_cannot_judge_is_refused_with_its_example(columns, said):
    reward = build_reward(RewardConfig(name="reasoning_gym"))
    with pytest.raises(ValueError, match=f"example 'ex-3': .*{said}"):
        reward.validate([Example("ex-3", "p", columns=columns)])


# ---- what verifiers may evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", sorted(ANSWERS))
def test_an_answer_that_would_run_code_never_reaches_a_verifier_that_evaluates_it(task, tmp_path):
    victim = tmp_path / "victim"
    for code in (
        f"open({str(victim)!r}, 'w')",
        f"[open({str(victim)!r}, 'w') for _ in [1]]",
        f"__import__('pathlib').Path({str(victim)!r}).touch()",
        f"[f'{{open({str(victim)!r}, chr(119))}}']",
    ):
        assert not may_verify(task, code)
        assert verified(task, code, {"answer": "whole"}) == 0.0
    assert not victim.exists()


@pytest.mark.parametrize("text", ["9**9**9", "(x**9)**9", "x**21", "9" * 40, "1e99", "x**y", "-" * 1900 + "1", "x" * 9])
def test_what_takes_for_ever_to_expand_is_no_algebra(text):
    assert not is_algebra(text)


@pytest.mark.parametrize(
    "text", ["2*(-10*x - 10)**(3/2)/3 + C", "x**(-1/2)", "exp(x)*sin(2*x)", "63*X**8 - 12*X**5", "7"]
)
def test_what_an_integral_looks_like_is_algebra(text):
    assert is_algebra(text)


def test_arithmetic_and_literals_have_no_names_calls_or_products_of_lists():
    assert is_arithmetic("49*(85 - 1)/14 - -42.5")
    assert not is_arithmetic("x + 1")
    assert not is_arithmetic("2**3")
    assert is_literal("[['A', 1], [-2]]")
    assert is_literal("Q _ _\n_ Q _")
    assert not is_literal("[0]*10**10")
    assert not is_literal("[x]")
    assert not is_literal("[" * 3000)
