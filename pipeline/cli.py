"""The command line, over the same functions as the assets."""

import typer

from pipeline.commands import handing_on, machine, showing, starting, training

COMMANDS = (
    starting.init,
    machine.doctor,
    training.preprocess,
    training.train,
    training.evaluate,
    showing.samples,
    showing.compare,
    showing.leaderboard,
    showing.report,
    handing_on.export,
    handing_on.serve,
    showing.schema,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train language models on MLX.",
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """A mistake in settings, files or the environment is a message, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
