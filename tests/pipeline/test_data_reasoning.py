import json
import shutil
from decimal import Decimal

import pytest

from configs.schema import ReasoningGymSource
from pipeline.data.reasoning import generate, make_rows, worked_solution
from rewards.reasoning_gym import ReasoningGym


def source(*tasks, **settings):
    return ReasoningGymSource.model_validate({"tasks": tasks, "size": 30, **settings})


def rows(*tasks, **settings):
    return list(make_rows(source(*tasks, **settings)))


@pytest.mark.parametrize(
    ("expression", "answer", "solution"),
    [
        ("24 + 7 - 13", "18", "24 + 7 = 31\n31 - 13 = 18\n#### 18"),
        ("4 - -1", "5", "4 - -1 = 5\n#### 5"),
        ("3 - 8 + 5", "0", "3 - 8 = -5\n-5 + 5 = 0\n#### 0"),
        ("5", "5", "#### 5"),
        ("1.42 + 5.720", "7.140", "1.42 + 5.720 = 7.140\n#### 7.140"),
        ("0.1 - 0.0999999", "0.0000001", "0.1 - 0.0999999 = 0.0000001\n#### 0.0000001"),
        ("-2 * 0 * 7", "0", "-2 * 0 = 0\n0 * 7 = 0\n#### 0"),
        (
            f"{10**20} * {10**20 + 1}",
            f"{10**40 + 10**20}",
            f"{10**20} * {10**20 + 1} = {10**40 + 10**20}\n#### {10**40 + 10**20}",
        ),
    ],
)
def test_a_chain_is_worked_from_left_to_right(expression, answer, solution):
    assert worked_solution(expression, answer) == solution


def test_steps_that_end_elsewhere_are_refused():
    with pytest.raises(ValueError, match=r"'2 \+ 3' end at 5, and the answer is '6'"):
        worked_solution("2 + 3", "6")


@pytest.mark.parametrize(
    "task",
    [
        {"name": "chain_sum", "options": {"allow_negation": True}},
        {"name": "decimal_chain_sum", "options": {"allow_negation": True}},
        {"name": "products", "options": {"max_terms": 4, "max_digits": 12}},
    ],
    ids=lambda task: task["name"],
)
def test_every_solution_ends_at_the_answer_of_its_task_and_its_verifier_agrees(task):
    reward = ReasoningGym()
    for row in rows(task, solution="steps"):
        *steps, last = row["target"].split("\n")
        assert last == f"#### {row['answer']}"
        assert len(steps) == len(row["expression"].split()) // 2
        assert Decimal(steps[-1].split("= ")[1]) == Decimal(row["answer"])
        assert reward([""], [row["target"]], task=[row["task"]], entry=[row["entry"]]) == [1.0]


def test_a_row_holds_the_question_the_short_expression_and_what_its_verifier_needs():
    row = rows({"name": "chain_sum", "options": {"max_terms": 2}})[0]
    assert row["target"] == row["answer"]
    assert row["question"] == row["entry"]["question"]
    assert row["expression"] in row["question"]
    assert row["entry"]["options"] == {"max_terms": 2}
    assert json.loads(json.dumps(row)) == row


def test_a_share_of_the_examples_is_worked_out_and_the_others_state_the_answer():
    made = rows({"name": "chain_sum"}, size=400, solution="steps", steps_share=0.25)
    bare = [row for row in made if row["target"] == f"#### {row['answer']}"]
    # Four standard deviations of a binomial of 400 draws at 3/4 are 35.
    assert abs(len(bare) - 300) < 35
    assert all(row["target"].endswith(f"\n#### {row['answer']}") for row in made if row not in bare)


def test_a_task_without_a_reference_answer_has_none():
    row = rows({"name": "graph_color"})[0]
    assert (row["answer"], row["target"]) == (None, None)
    assert "expression" not in row


def test_neighbouring_seeds_share_no_questions_by_design():
    big = {"name": "chain_sum", "options": {"min_digits": 4, "min_terms": 4}}
    first, second = ({row["question"] for row in rows(big, seed=seed)} for seed in (0, 1))
    assert len(first) == len(second) == 30
    assert not first & second


def test_weights_are_shares():
    tasks = [{"name": "chain_sum", "weight": 3}, {"name": "products"}]
    made = [row["task"] for row in rows(*tasks, size=400)]
    # Four standard deviations of a binomial of 400 draws at 1/4 are 35.
    assert abs(made.count("products") - 100) < 35


def test_a_child_process_makes_the_same_rows_and_hands_faults_over():
    settings = source({"name": "chain_sum"}, solution="steps")
    assert list(generate(settings)) == list(make_rows(settings))
    with pytest.raises(ValueError, match=r"tasks\.0\.name: no worked solutions for 'maze'; .*'chain_sum'"):
        list(generate(source({"name": "maze"}, solution="steps")))


def test_a_child_process_that_dies_is_a_fault_and_not_a_short_dataset(monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(ValueError, match="generating ended with status 1"):
        list(generate(source({"name": "chain_sum"})))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"name": "chian_sum"}, r"tasks\.0\.name: reasoning-gym has no task 'chian_sum'; it has chain_sum"),
        ({"name": "codeio"}, r"tasks\.0\.name: 'codeio' is not offered: it runs code"),
        ({"name": "composite"}, "list its tasks here instead"),
        (
            {"name": "chain_sum", "options": {"max_term": 2}},
            r"tasks\.0\.options: .*no option \['max_term'\]; it has .*'max_terms'",
        ),
        ({"name": "chain_sum", "options": {"seed": 2}}, r"no option \['seed'\]"),
        ({"name": "chain_sum", "options": {"max_terms": 1}}, r"refuses \{'max_terms': 1\}: AssertionError: max_terms"),
        ({"name": "chain_sum", "options": {"max_terms": "x"}}, "TypeError"),
        (
            {"name": "maze", "options": {"max_grid_size": 10**9, "min_grid_size": 5, "max_dist": 0, "min_dist": 9}},
            "maze",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_task_that_cannot_be_made_is_refused_with_its_place(task, said):
    with pytest.raises(ValueError, match=f"reasoning_gym: tasks.0.*{said}" if not said.startswith("tasks") else said):
        rows(task)
