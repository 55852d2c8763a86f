"""SIGKILL at random moments of short trainings, each from its beginning: `python -m tests.faults.kills [KILLS]`.

After each kill the run is started again and must end bit for bit like one that was never killed. The last line counts.
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.bench import assert_equal, copy_of, finish, kill_after, outcome, prepare


def main(kills: int) -> None:
    """Half of the kills in GRPO, half in PPO."""
    with tempfile.TemporaryDirectory() as temporary:
        begun = Path(temporary) / "begun"
        experiment = prepare(begun)
        hits = 0
        for stage in ("grpo", "ppo"):
            whole = copy_of(begun, Path(temporary) / f"{stage}_whole")
            seconds = finish(whole, stage)
            expected, moments = outcome(whole, experiment, stage), random.Random(stage)
            for number in range(kills // 2):
                folder = copy_of(begun, Path(temporary) / "killed")
                moment = moments.uniform(0.0, 1.0) * seconds
                hit = kill_after(folder, stage, moment)
                hits += hit
                finish(folder, stage)
                assert_equal(outcome(folder, experiment, stage), expected)
                print(
                    f"{stage} {number + 1}: {'killed' if hit else 'ended before the kill'} at {moment:.2f} s",
                    flush=True,
                )
                shutil.rmtree(folder)
    print(f"{hits} kills, {2 * (kills // 2)} runs, all equal to the run that was never killed")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
