"""Evaluations with a real model and the real engine: random weights say nonsense, but the same nonsense each time."""

from contextlib import contextmanager
from io import StringIO

import pytest

from configs.schema import PromptConfig, RewardConfig, ScratchModel
from mlx_ops.generation import generate
from mlx_ops.model import load_policy, make_scratch
from pipeline.evaluation.base import Output, Problem
from pipeline.evaluation.drawing import draw
from pipeline.evaluation.report_files import read_items, untimed
from pipeline.evaluation.run import evaluate
from pipeline.progress import drawing
from tests.pipeline.evaluating import CORPUS, config, context, sums


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    size = ScratchModel(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    make_scratch(size, CORPUS, folder, seed=0)
    return load_policy(folder)


def run(policy, folder, benchmark="gsm8k", seed=0, **fields):
    surroundings = context(sums(7), rewards=(RewardConfig(name="numeric_answer"),), seed=seed)
    run_config = config(benchmark, max_tokens=12, **fields)
    return evaluate(policy, run_config, context=surroundings, directory=folder), read_items(folder)


def texts(items):
    return [[sample.text for sample in item.samples] for item in items]


def test_two_evaluations_of_one_seed_are_equal_but_for_the_times(policy, tmp_path):
    fields = {"temperature": 1.0, "samples": 3, "batch_size": 5}
    first, second = run(policy, tmp_path / "a", **fields), run(policy, tmp_path / "b", **fields)
    assert untimed(*first) == untimed(*second)
    assert texts(first[1]) != texts(run(policy, tmp_path / "c", seed=1, **fields)[1])


def test_samples_of_one_item_differ(policy, tmp_path):
    _, items = run(policy, tmp_path / "a", temperature=1.0, samples=3)
    assert all(len(set(samples)) == 3 for samples in texts(items))


def test_a_limit_leaves_the_completions_of_the_others_as_they_are(policy, tmp_path):
    fields = {"temperature": 1.0, "samples": 2}
    whole, part = run(policy, tmp_path / "a", **fields)[1], run(policy, tmp_path / "b", limit=3, **fields)[1]
    assert texts(part) == texts(whole)[:3]


def test_stop_strings_end_rows_while_they_are_drawn(policy):
    problems = [Problem(example, PromptConfig(chat=False)) for example in sums(5)]

    def outputs(*stop: str) -> list[Output]:
        return draw(policy, problems, config("gsm8k", max_tokens=12), seed=0, stop=stop, generate=generate).rows

    free = outputs()
    letter = free[0].text[4]
    stopped = outputs(letter)
    assert [output.text for output in stopped] == [output.text.partition(letter)[0] for output in free]
    assert stopped[0].finish == "stop"
    assert len(stopped[0].tokens) < len(free[0].tokens)
    assert free[0].tokens[: len(stopped[0].tokens)] == stopped[0].tokens


def test_held_out_runs_on_the_engine(policy, tmp_path):
    report, items = run(policy, tmp_path / "a", "held_out")
    assert report.headline.n == len(items) == 7
    assert report.counts.completions == 7
    assert report.tokens.completion == sum(item.samples[0].tokens for item in items)
    assert report.model.dtype == "float32"
    assert report.prompt.chat_template_sha256 is not None


def test_rows_speed_and_time_left_are_shown_while_completions_are_drawn():
    now, stream = [0.0], StringIO()
    with drawing("gsm8k", 4, stream, lambda: now[0]) as told:
        now[0] = 4.0
        told(1, 100)
        told(1, 120)
        now[0] = 14.0
        told(4, 700)
    assert stream.getvalue().splitlines() == ["gsm8k 1/4 · 25 tokens/s", "gsm8k 4/4 · 50 tokens/s · 0:00:00 left"]


def test_an_evaluation_tells_how_many_rows_it_draws(policy, tmp_path):
    seen = []

    @contextmanager
    def show(name, rows):
        yield lambda finished, tokens: seen.append((name, rows, finished))

    run_config = config("gsm8k", options={"protocol": "experiment"}, samples=2, temperature=1.0, max_tokens=4)
    evaluate(policy, run_config, context=context(sums(3)), directory=tmp_path / "r", progress=show)
    assert seen[-1] == ("gsm8k", 6, 6)
