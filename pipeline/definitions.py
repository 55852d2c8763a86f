"""What Dagster loads. The one place that reads environment variables.

- `MLX_RL_EXPERIMENTS`: another folder of experiments than `configs/experiments`.
- `MLX_RL_OVERRIDES`: settings laid over the files, as `quickstart:grpo.steps=2 quickstart:model.path=/models/x`.
- `MLX_RL_ARTIFACTS`: another root of artifacts than `artifacts`.
"""

import os
import shlex
from pathlib import Path

import click
import dagster as dg

from configs.loader import EXPERIMENTS
from pipeline.catalog import load_catalog
from pipeline.factory import build_definitions


@dg.definitions
def defs() -> dg.Definitions:
    folder = Path(os.environ.get("MLX_RL_EXPERIMENTS", EXPERIMENTS)).expanduser()
    overrides = shlex.split(os.environ.get("MLX_RL_OVERRIDES", ""))
    try:
        entries = load_catalog(folder, overrides)
    except ValueError as error:
        # Dagster's command line shows this one as a message without a traceback, and exits with 1.
        raise click.ClickException(str(error)) from None
    return build_definitions(entries, os.environ.get("MLX_RL_ARTIFACTS", "artifacts"))
