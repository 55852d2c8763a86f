"""What Dagster loads. The one place that reads environment variables.

- `MLX_RL_EXPERIMENTS`: another folder of experiments than `configs/experiments`.
- `MLX_RL_OVERRIDES`: settings laid over the files, as `quickstart:grpo.steps=2 quickstart:model.path=/models/x`.
- `MLX_RL_ARTIFACTS`: another root of artifacts than `artifacts`.
"""

import os
import shlex
from pathlib import Path

import dagster as dg

from configs.loader import EXPERIMENTS
from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions


@dg.definitions
def defs() -> dg.Definitions:
    folder = Path(os.environ.get("MLX_RL_EXPERIMENTS", EXPERIMENTS)).expanduser()
    overrides = shlex.split(os.environ.get("MLX_RL_OVERRIDES", ""))
    return build_definitions(load_catalog(folder, overrides), os.environ.get("MLX_RL_ARTIFACTS", "artifacts"))
