"""The asset job with its history in Postgres: a server of Debian's packages, started here and thrown away."""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "configs" / "postgres" / "dagster.yaml"
USER = "postgres"
"""Who runs the server where we are root: it refuses to run as root."""


def programs() -> Path:
    """The folder of Postgres's programs."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "initdb").is_file():
        pytest.skip("no Postgres server here: apt-get install postgresql")
    return found[-1]


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """The address of an empty database."""
    pytest.importorskip("dagster_postgres", reason="pip install 'mlx-rl-trainer[postgres]'")
    folder, port = tmp_path / "server", free_port()
    owner = None
    if os.geteuid() == 0:
        try:
            owner = pwd.getpwnam(USER)
        except KeyError:
            pytest.skip("Postgres refuses to run as root, and there is no user postgres")
        folder = Path(f"/tmp/mlx-rl-postgres-{os.getpid()}")
    folder.mkdir()
    if owner is not None:
        os.chown(folder, owner.pw_uid, owner.pw_gid)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs() / program), *arguments]
        log = subprocess.DEVNULL  # pg_ctl's server would keep a pipe open
        subprocess.run(command, check=True, stdout=log, stderr=log, cwd=folder, user=USER if owner else None)

    try:
        run("initdb", "-D", str(folder / "data"), "-U", "dagster", "--auth=trust", "--no-sync")
        options = f"-p {port} -h 127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", str(folder / "data"), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg2://dagster@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_asset_job_runs_on_postgres_and_its_history_is_there(write_experiment, tmp_path, address):
    folder = write_experiment().parent
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(SETTINGS, home / "dagster.yaml")
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "DAGSTER_PG_URL": address,
        "MLX_RL_EXPERIMENTS": str(folder),
        "MLX_RL_ARTIFACTS": str(tmp_path / "artifacts"),
    }
    command = ["job", "execute", "-m", "pipeline.definitions", "-j", "tiny", "-c", "configs/runs/quiet.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "dagster", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "artifacts" / "leaderboard.json").is_file()
    assert materialised(address) >= {'["tiny", "grpo_checkpoint"]', '["leaderboard"]'}
    assert not list(home.rglob("*.db"))


def materialised(address: str) -> set[str]:
    from sqlalchemy import create_engine, text

    engine = create_engine(address)
    with engine.connect() as connection:
        rows = connection.execute(
            text("select distinct asset_key from event_logs where dagster_event_type = 'ASSET_MATERIALIZATION'")
        )
        found = {row[0] for row in rows}
    engine.dispose()
    return found


def test_the_postgres_instance_is_the_repositorys_but_for_where_things_are():
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (SETTINGS, ROOT / "dagster.yaml"))
    places = {"storage", "local_artifact_storage", "compute_logs"}
    assert {name: ours[name] for name in ours.keys() - places} == {n: theirs[n] for n in theirs.keys() - places}
