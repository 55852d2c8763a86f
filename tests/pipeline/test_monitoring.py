import base64
import io
import json
import logging
import math
import os
import pty
import random
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.schema import MonitoringConfig
from pipeline.metadata import SAMPLE_COLUMNS, final_numbers, table, training_metadata
from pipeline.monitoring import LOG, open_reporter
from pipeline.plots import MAX_BYTES, curves
from pipeline.progress import PlainLines, Progress, RichBar, console
from pipeline.sinks import METRICS, JsonLines, RunInfo, Sink, read_metrics

OFF = MonitoringConfig()


def info(directory: Path, steps: int = 10) -> RunInfo:
    return RunInfo(experiment="tiny", stage="grpo", run="abcd1234", directory=directory, steps=steps)


class Listed(Sink):
    """Keeps what it is told; fails at one step, the way it is told to."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.steps: list[int] = []
        self.closed: list[bool] = []
        self.fails_at, self.error = fails_at, error or OSError("the disk is full")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise self.error
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_each_step_is_a_row(tmp_path):
    with open_reporter(info(tmp_path), OFF) as report:
        report(1, {"loss": 0.5})
        report(2, {"loss": 0.25, "reward": 1.0})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.25)]


def test_a_resumed_run_repeats_no_step(tmp_path):
    with open_reporter(info(tmp_path), OFF) as report:
        for step in (1, 2, 3, 4):
            report(step, {"loss": 1.0})
    with open_reporter(info(tmp_path), OFF) as report:  # the newest checkpoint was that of step 2
        for step in (3, 4, 5):
            report(step, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_resumed_run_with_nothing_left_to_do_keeps_its_rows(tmp_path):
    with open_reporter(info(tmp_path), OFF) as report:
        report(1, {"loss": 1.0})
    with open_reporter(info(tmp_path), OFF):
        pass
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with open_reporter(info(tmp_path), OFF) as report:
        report(2, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_what_is_not_finite_is_null_and_the_row_stays_json(tmp_path):
    sink = JsonLines(tmp_path / METRICS)
    sink.report(1, {"loss": math.nan, "kl": math.inf, "reward": 0.5})
    sink.close(failed=False)
    row = json.loads((tmp_path / METRICS).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["loss"], row["kl"], row["reward"]) == (None, None, 0.5)


# ---- sinks that fail -----------------------------------------------------------------------------------------------


def test_a_sink_that_fails_in_mid_run_is_a_warning_and_the_others_go_on(tmp_path, caplog):
    fails, works = Listed(fails_at=2), Listed()
    with open_reporter(info(tmp_path), OFF, [fails, works]) as report:
        for step in (1, 2, 3):
            report(step, {})
    assert (fails.steps, works.steps) == ([1], [1, 2, 3])
    assert "Listed fails, training goes on without it: the disk is full" in caplog.text


def test_a_bug_in_a_sink_stops_the_run(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        open_reporter(info(tmp_path), OFF, [Listed(1, ZeroDivisionError())]) as report,
    ):
        report(1, {})


def test_a_sink_that_fails_to_start_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), open_reporter(info(tmp_path / "file" / "run"), OFF):
        pass


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["finished", "interrupted"])
def test_sinks_are_closed_once_and_told_how_it_ended(tmp_path, error):
    sink = Listed()
    try:
        with open_reporter(info(tmp_path), OFF, [sink]):
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert sink.closed == [error is not None]


# ---- the log -------------------------------------------------------------------------------------------------------


def test_our_debug_messages_are_in_the_log_of_the_run_and_only_during_it(tmp_path):
    logger = logging.getLogger("mlx_ops.something")
    with open_reporter(info(tmp_path), OFF):
        logger.debug("seen")
    logger.debug("unseen")
    text = (tmp_path / LOG).read_text()
    assert "DEBUG mlx_ops.something: seen" in text
    assert "unseen" not in text


def test_a_level_that_somebody_set_stands(tmp_path):
    logger = logging.getLogger("rewards")
    logger.setLevel(logging.INFO)  # as Dagster does for the loggers it manages
    try:
        with open_reporter(info(tmp_path), OFF):
            logger.debug("chatter")
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(logging.NOTSET)
    assert "chatter" not in (tmp_path / LOG).read_text()


# ---- the console ---------------------------------------------------------------------------------------------------


def test_progress_says_speed_and_time_left(tmp_path):
    seconds = iter([0.0, 20.0])
    progress = Progress(info(tmp_path, steps=110), clock=lambda: next(seconds))
    metrics = {"reward": 0.5, "tokens_generated": 3000.0, "seconds/step": 2.0}
    assert progress.words(1, metrics) == "grpo 1/110 · reward 0.5 · 1,500 tokens/s"
    # 10 steps took 20 seconds, 99 are left.
    assert progress.words(11, metrics) == "grpo 11/110 · reward 0.5 · 1,500 tokens/s · 0:03:18 left"


def test_a_log_gets_a_line_now_and_then_and_always_the_last(tmp_path):
    stream = io.StringIO()
    sink = PlainLines(info(tmp_path, steps=5), stream, clock=lambda: 0.0)
    for step in range(1, 6):
        sink.report(step, {})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/5", "5/5"]


def everything(descriptor: int) -> bytes:
    chunks = []
    try:
        while chunk := os.read(descriptor, 65_536):
            chunks.append(chunk)
    except OSError:  # Linux says so when a terminal's other end is closed
        pass
    os.close(descriptor)
    return b"".join(chunks)


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, (tmp_path / "log").open("w") as file:
        bar = console(info(tmp_path), terminal)
        bar.report(1, {"loss": 0.5})
        bar.close(failed=False)
        assert isinstance(bar, RichBar)
        assert isinstance(console(info(tmp_path), file), PlainLines)
    assert b"grpo 1/10" in everything(leader)


# ---- W&B -----------------------------------------------------------------------------------------------------------


def test_wandb_works_offline_without_an_account(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_reporter(info(tmp_path), MonitoringConfig(wandb="offline")) as report:
        report(1, {"loss": 0.5})
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.name == "run-tiny-grpo-abcd1234.wandb"
    deadline = time.monotonic() + 20  # W&B's own process writes behind
    while b"loss" not in written.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"loss" in written.read_bytes()


# ---- what the asset's page shows -----------------------------------------------------------------------------------


def png_size(markdown: str) -> tuple[int, int]:
    data = base64.b64decode(markdown.split("base64,")[1].rstrip(")"))
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_a_plot_of_a_long_run_stays_small():
    rows = [{"step": step, "reward": math.sin(step)} for step in range(1, 20_001)]
    plot = curves(rows, {"reward": {"reward"}.__contains__}, "curves")
    assert plot is not None
    assert plot.md_str is not None
    assert png_size(plot.md_str) == (384, 136)


def test_a_plot_of_a_noisy_run_with_every_panel_stays_small():
    noise = random.Random(0).random
    names = [
        "eval_reward",
        "completion_length",
        "kl",
        "entropy",
        "loss",
        "grad_norm",
        *(f"reward/{i}" for i in range(12)),
    ]
    rows = [{"step": step, **{name: noise() for name in names}} for step in range(1, 2_001)]
    plot = training_metadata(rows, [])["curves"]
    assert png_size(plot.md_str) == (544, 408)
    assert len(plot.md_str) < MAX_BYTES * 4 / 3 + 100


def test_a_line_of_zeros_and_a_part_that_is_the_whole_reward_are_not_drawn():
    rows = [{"step": step, "reward": step / 10, "kl": 0.0} for step in range(1, 10)]
    plain = training_metadata([{"step": row["step"], "reward": row["reward"]} for row in rows], [])["curves"]
    assert training_metadata([row | {"reward/numeric_answer": row["reward"]} for row in rows], [])["curves"] == plain
    assert training_metadata([row | {"reward/length": 0.5} for row in rows], [])["curves"] != plain


def test_metrics_that_no_row_has_make_no_plot():
    panels = {"KL": {"kl"}.__contains__}
    assert curves([{"step": 1, "loss": 1.0}], panels, "curves") is None
    assert curves([{"step": 1, "kl": None}, {"step": 2, "kl": math.nan}], panels, "curves") is None


def test_the_last_numbers_are_labels_and_what_is_not_finite_is_left_out():
    assert final_numbers({"step": 7, "time": 1e9, "loss": 0.5, "kl": math.nan, "note": "x"}) == {"step": 7, "loss": 0.5}


def test_a_run_without_rows_or_samples_has_a_page_too():
    metadata = training_metadata([], [])
    assert list(metadata) == ["samples"]
    assert metadata["samples"].records == []


def test_samples_are_a_table_with_short_cells():
    (record,) = table([{"step": 3, "reward": 0.123456, "completion": "x" * 5000}], SAMPLE_COLUMNS).records
    assert record.data["reward"] == "0.1235"
    assert record.data["answer"] == ""
    assert len(str(record.data["completion"])) == 1000


def test_nothing_on_the_page_is_called_path():
    rows = [{"step": 1, "reward": 0.5, "reward/a": 0.5, "reward/b": 0.5, "loss": 1.0}]
    labels = training_metadata(rows, [])
    assert {"curves", "reward", "samples"} <= labels.keys()
    assert "path" not in labels
