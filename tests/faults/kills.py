"""SIGKILL at random moments of short trainings, each from its beginning: `python -m tests.faults.kills [KILLS]`.

After each kill the newest checkpoint verifies, and the run is started again and must end bit for bit like one that was
never killed. A moment is a random time and then the next time that the run is in its rollout, update, report or save,
in turn. The last lines are the table.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from mlx_ops.checkpoint import CheckpointStore
from tests.faults.bench import assert_equal, copy_of, finish, kill_after, outcome, prepare
from tests.faults.run import PHASES

STAGES = ("grpo", "ppo")
ENDED = "ended before"
"""Doesn't count."""


def main(kills: int) -> None:
    """Half of the kills in GRPO, half in PPO."""
    with tempfile.TemporaryDirectory() as temporary:
        begun = Path(temporary) / "begun"
        experiment = prepare(begun)
        found = {}
        for stage in STAGES:
            whole = copy_of(begun, Path(temporary) / f"{stage}_whole")
            seconds = finish(whole, stage)
            expected, moments = outcome(whole, experiment, stage), random.Random(f"{stage} {kills}")
            found[stage] = counts = Counter()
            while (number := counts.total() - counts[ENDED]) < kills // 2:
                folder = copy_of(begun, Path(temporary) / "killed")
                phase = kill_after(folder, stage, moments.uniform(0.0, 0.8) * seconds, "gurs"[number % 4])
                counts[PHASES.get(phase, ENDED)] += 1
                store = CheckpointStore(folder / "run" / "checkpoints", getattr(experiment, stage).checkpoint)
                assert store.newest()[1] == [], "a checkpoint that is there doesn't verify"
                seconds = min(seconds, finish(folder, stage))
                assert_equal(outcome(folder, experiment, stage), expected)
                print(f"{stage} {number + 1}: {PHASES.get(phase, ENDED)}", flush=True)
                shutil.rmtree(folder)
    columns = [*PHASES.values(), ENDED]
    print(f"\n| killed in | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for stage, counts in found.items():
        print(f"| {stage} | {' | '.join(str(counts[name]) for name in columns)} |")
    print("all of them ended equal to a run that was never killed")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
