"""The sampled groups of each step as Parquet, one file a step: prompt, completion, every reward, advantage, length."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class SampleFiles:
    """Writes a step's rollouts into `step_000001.parquet` and so on; a step that is run again replaces its file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pandas as pd

        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{rows[0]['step']:06d}.parquet"
        beside = path.with_name(f".{path.name}.tmp")
        flat = [{**row, "rewards": json.dumps(dict(row["rewards"]), sort_keys=True)} for row in rows]
        pd.DataFrame(flat).to_parquet(beside, index=False)
        beside.replace(path)

    def best_and_worst(self, count: int, step: int | None = None) -> list[dict[str, Any]]:
        """Of a step, the last where absent: the `count` highest rewards and the `count` lowest, each rollout once."""
        import pandas as pd

        files = sorted(self.directory.glob("step_*.parquet" if step is None else f"step_{step:06d}.parquet"))
        if not files:
            return []
        rows = pd.read_parquet(files[-1]).sort_values("reward", ascending=False, kind="stable")
        chosen = pd.concat([rows.head(count), rows.tail(min(count, max(len(rows) - count, 0)))])
        return [{str(key): value for key, value in row.items()} for row in chosen.to_dict("records")]
