"""Memory and disk stay flat; `python -m tests.faults.long` takes 2,000 steps."""

from tests.faults.bench import prepare
from tests.faults.long import growth, run


def test_three_hundred_steps_grow_neither_memory_nor_the_checkpoints(tmp_path):
    settings = {
        "steps": 300,
        "learning_rate": 1e-6,
        "group_size": 2,
        "sampling": {"max_tokens": 4},
        "dynamic_sampling": 0,
        "checkpoint": {"save_every": 20},
    }
    course = run(tmp_path, prepare(tmp_path, grpo=settings))
    for name in ("resident", "active", "disk"):
        assert growth(getattr(course, name), 100, 100) < 0.05, name
