"""The reward `code_tests`, with real programs in the real sandbox."""

import pytest

from configs.schema import RewardConfig
from rewards import Example, RewardComposer, RewardRegistry
from rewards.code_tests import CodeTests, called_function
from rewards.sandbox import Judge

ASSERTS = ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]
RIGHT, HALF, EXIT = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return 0\n", "import os\nos._exit(0)\n"


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        with Judge():
            pass
    except RuntimeError as error:
        pytest.skip(f"no sandbox here: {error}")


def reward(**options):
    return CodeTests(CodeTests.Options.model_validate(options))


def scores(completions, options=None, prompts=None, **columns):
    table = {"tests": ASSERTS} | columns
    rows = {name: [cell] * len(completions) for name, cell in table.items()}
    return reward(**options or {})(prompts or ["Write add(a, b)."] * len(completions), completions, **rows)


def test_all_pays_for_a_program_that_passes_every_test_and_share_for_each_assert():
    completions = [f"Sure:\n```python\n{code}```" for code in (RIGHT, HALF, EXIT)] + ["I don't know."]
    assert scores(completions) == [1, 0, 0, 0]
    assert scores(completions, {"score": "share"}) == [1, 0.5, 0, 0]


def test_the_imports_and_helpers_of_the_prompt_belong_to_program_and_test():
    prompt = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Area of a half disc."""\n'
    test = "def check(candidate):\n    assert math.isclose(candidate(2), half(4 * math.pi))\n"
    completions = ["    return half(math.pi * r * r)\n", "    return math.pi * r * r\n"]
    options = {"tests": "test", "entry_point": "name"}
    assert scores(completions, options, [prompt] * 2, test=test, name="area") == [1, 0]


def test_what_stands_before_the_tests_has_a_column_of_its_own():
    columns = {"tests": ["assert math.floor(add(1, 1.5)) == 2"], "before": ["import math", "offset = 0"]}
    assert scores([RIGHT, HALF], {"setup": "before"}, **columns) == [1, 0]


@pytest.mark.parametrize(
    ("tests", "name"),
    [
        ("assert add(1, 2) == 3", "add"),
        ("assert set(f((1, 2))) == set(f((2, 1)))", "f"),
        ("from math import sqrt\nassert abs(root(sqrt(4)) - sqrt(2)) < 1", "root"),
        ("root = Node(1)\nassert depth(Node(Node(root))) == 3", "depth"),
        ("assert sum(10, 15) == 6", "sum"),
        ("def near(a, b):\n    return a == b\nassert near(f(1), 1) and near(f(2), 2)", "f"),
    ],
)
def test_the_function_that_the_tests_call_is_the_one_that_is_asked_for(tests, name):
    assert called_function(tests) == name


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert add(1, 2 == 3", "not Python"),
        ("assert 1 == 1", "call no function"),
        ("def check(candidate):\n    assert candidate(1) == 1", "entry_point"),
        (None, "call no function"),
        (7, "expected a text or a list of texts"),
    ],
)
def test_tests_that_cannot_be_used_are_named_before_training(tests, message):
    with pytest.raises(ValueError, match=f"example 'ex-7'.*{message}"):
        reward().validate([Example("ex-7", "p", columns={"tests": tests})])


def test_a_solution_that_fails_its_own_tests_is_named_before_training():
    rows = [Example(name, "p", columns={"tests": ASSERTS, "code": code}) for name, code in (("a", RIGHT), ("b", HALF))]
    with pytest.raises(ValueError, match=r"1 of 2 solutions \(column 'code'\).*'b': AssertionError.*add\(2, 3\)"):
        reward(solution="code").validate(rows)
    reward(solution="code").validate(rows[:1])


def test_a_broken_test_stops_the_run_and_names_its_example():
    composer = RewardComposer.from_config([RewardConfig(name="code_tests")])
    columns = {"tests": [ASSERTS, ["assert add(lambda: 1, 2)"]], "id": ["fine", "broken"]}
    with pytest.raises(ValueError, match=r"'code_tests' failed on example 'broken'.*the test passes an object"):
        composer(["p", "p"], [RIGHT, RIGHT], columns)


def test_without_a_sandbox_training_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.candidates", lambda limits: [])
    example = Example("ex-1", "p", columns={"tests": ASSERTS})
    with pytest.raises(RuntimeError, match=r"(?s)apt install bubblewrap.*unsafe_no_sandbox: true"):
        reward().validate([example])
    with pytest.raises(RuntimeError, match="not run"):
        scores([RIGHT])
    reward(unsafe_no_sandbox=True).validate([example])
    assert scores([RIGHT, HALF], {"unsafe_no_sandbox": True}) == [1, 0]


def test_a_sandbox_that_fails_is_no_score(monkeypatch):
    monkeypatch.setattr("rewards.sandbox_backends.interpreter_path", lambda: "/no/such/python")
    with pytest.raises(RuntimeError):
        scores([RIGHT])


def test_it_is_registered():
    assert RewardRegistry["code_tests"] is CodeTests
