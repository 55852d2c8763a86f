"""One short training in a process of its own, to be killed: `python -m tests.faults.run FOLDER STAGE`.

FOLDER holds `dataset/`, `start/` and `experiment.json`; the run goes to FOLDER/run.
"""

import sys
from pathlib import Path

from configs.schema import ExperimentConfig, MonitoringConfig
from pipeline.monitoring import open_reporter
from pipeline.resources import DeviceSettings
from pipeline.sinks import RunInfo
from pipeline.train import Job, train_stage


def main(folder: Path, stage: str) -> None:
    """Train the stage, or go on with it."""
    experiment = ExperimentConfig.model_validate_json((folder / "experiment.json").read_bytes())
    run_dir = folder / "run"
    info = RunInfo(
        experiment=experiment.name,
        stage=stage,
        run="faults",
        directory=run_dir,
        steps=getattr(experiment, stage).steps,
        settings=experiment.model_dump(mode="json"),
    )
    with open_reporter(info, MonitoringConfig()) as reporter:
        (folder / "ready").touch()
        job = Job(experiment, folder / "dataset", folder / "start", run_dir, DeviceSettings(device="cpu"), reporter)
        train_stage(job, stage)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
