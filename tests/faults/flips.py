"""Flipped bytes, one at a time, anywhere in a run's newest checkpoint and its pointers: `python -m tests.faults.flips`.

Each time the checkpoint must not load, the file must be named, and the checkpoint before must be taken; a pointer must
be named and written anew.
"""

import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from configs.atomic import read_sealed
from mlx_ops.checkpoint import POINTERS, CheckpointStore
from tests.faults.bench import finish, prepare


def flip(file: Path, chance: random.Random) -> bytes:
    """Change one bit of a file; what it held before."""
    before = file.read_bytes()
    place = chance.randrange(len(before))
    file.write_bytes(before[:place] + bytes([before[place] ^ 1 << chance.randrange(8)]) + before[place + 1 :])
    return before


def check_checkpoint(store: CheckpointStore, file: Path, chance: random.Random) -> None:
    """One flip in a file of the newest checkpoint, and back."""
    newest, older = store.steps()[-1], store.steps()[-2]
    before = flip(file, chance)
    saved, skipped = CheckpointStore(store.root, store.config).newest()
    assert saved is not None
    assert saved.step == older, f"{file} was flipped, and step {saved.step} is taken"
    assert len(skipped) == 1
    assert str(file) in skipped[0], f"{file} was flipped, and {skipped[0]} is said"
    file.write_bytes(before)
    again, _ = store.newest()
    assert again is not None
    assert again.step == newest


def check_pointer(store: CheckpointStore, file: Path, chance: random.Random) -> None:
    """One flip in a pointer, which a run that goes on mends."""
    before = flip(file, chance)
    fresh = CheckpointStore(store.root, store.config)
    saved, skipped = fresh.newest()
    assert saved is not None
    assert skipped == []
    (fault,) = fresh.go_on_from(saved)
    assert str(file) in fault
    assert file.read_bytes() == before
    read_sealed(file)


def check(store: CheckpointStore, flips: int) -> Counter[str]:
    """So many flips over all files, each as likely as another; how many in which."""
    folder, chance, counts = store.path(store.steps()[-1]), random.Random(0), Counter()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    pointers = [store.root / name for name in POINTERS]
    for number in range(flips):
        file = [*files, *pointers][number % (len(files) + len(pointers))]
        (check_pointer if file in pointers else check_checkpoint)(store, file, chance)
        counts[file.name] += 1
    return counts


def main(flips: int) -> None:
    """Over a checkpoint of PPO, which has every file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "begun"
        experiment = prepare(folder, ppo={"steps": 6, "checkpoint": {"best_metric": "reward"}})
        finish(folder, "ppo")
        assert experiment.ppo is not None
        counts = check(CheckpointStore(folder / "run" / "checkpoints", experiment.ppo.checkpoint), flips)
        shutil.rmtree(folder)
    print(f"| flipped in | {' | '.join(counts)} |\n|---|{'---|' * len(counts)}")
    print(f"| {flips} flips | {' | '.join(map(str, counts.values()))} |")
    print("never loaded, always named, the one before taken; pointers named and written anew")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
