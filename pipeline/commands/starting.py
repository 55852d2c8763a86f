"""`init`: a first experiment file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

DATA, MODEL = "chain_sum", "HuggingFaceTB/SmolLM2-135M-Instruct"


def init(
    name: Annotated[str, typer.Argument(help="Lower case, digits, underscores.", show_default=False)],
    data: Annotated[str | None, typer.Option(help=f"A .jsonl file, or a reasoning-gym task ({DATA}).")] = None,
    model: Annotated[str | None, typer.Option(help=f"A hub id, a folder, or scratch ({MODEL}).")] = None,
    algorithm: Annotated[str | None, typer.Option(help="grpo, ppo or sft (grpo).")] = None,
    reward: Annotated[str | None, typer.Option(help="A registered reward (numeric_answer).")] = None,
    prompt: Annotated[str | None, typer.Option(help="The file's column with the question; guessed if absent.")] = None,
    answer: Annotated[str | None, typer.Option(help="The column that rewards compare with.")] = None,
    target: Annotated[str | None, typer.Option(help="The column that SFT imitates.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            envvar="MLX_RL_EXPERIMENTS",
            help="Where to put the file: the experiments of the repository, or the current folder outside of it.",
        ),
    ] = None,
) -> None:
    """Write a commented experiment file, from flags, or from answers where a terminal asks."""
    from configs.loader import EXPERIMENTS
    from pipeline.resources import project_root
    from pipeline.starter import Answers, write_experiment

    inside = Path.cwd() == project_root()
    if algorithm not in (None, "grpo", "ppo", "sft"):
        raise ValueError(f"--algorithm: {algorithm!r} is none of grpo, ppo, sft")
    chosen = asked("Data: a .jsonl file, or a reasoning-gym task", data, DATA)
    answers = Answers(
        name=name,
        # An absolute path holds from whatever folder the job is started.
        data=str(Path(chosen).resolve()) if chosen.endswith((".jsonl", ".jsonl.gz")) and not inside else chosen,
        model=asked("Model: a hub id, a folder, or scratch", model, MODEL),
        algorithm=asked("Algorithm: grpo, ppo or sft", algorithm, "grpo"),  # pyright: ignore[reportArgumentType]
        reward=asked("Reward", reward, "numeric_answer"),
        prompt=prompt,
        answer=answer,
        target=target,
    )
    file = write_experiment(answers, folder or (EXPERIMENTS if inside else Path()))
    print(f"wrote {file}")
    print(next_steps(name, file, inside and folder is None))


def asked(question: str, given: str | None, default: str) -> str:
    """What a flag says, else what a person in a terminal answers, else the default."""
    if given is not None:
        return given
    return typer.prompt(question, default=default) if sys.stdin.isatty() else default


def next_steps(name: str, file: Path, in_repository: bool) -> str:
    from pipeline.resources import project_root

    what = name if in_repository else str(file)
    job = f"dagster job execute -m pipeline.definitions -j {name}"
    if not in_repository:
        job = f"cd {project_root()} && MLX_RL_EXPERIMENTS={file.resolve().parent} {job}"
    steps = [f"  mlx-rl {command} {what}" for command in ("preprocess", "train", "evaluate")]
    return "\n".join([*steps, "or all of it, with Dagster:", f"  {job}"])
