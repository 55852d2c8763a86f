"""What there is, is documented: settings, plugins, commands; and the examples load."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from configs.loader import EXPERIMENTS
from configs.reference import markdown, sections
from configs.schema import GRPO_PRESETS
from pipeline.catalog import load_entry
from pipeline.cli import app
from pipeline.evaluation.run import EvaluatorRegistry
from rewards import RewardRegistry

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OPENING = "# experiment"


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_setting_has_a_meaning():
    assert [f"{m.__name__}.{name}" for m in sections() for name, f in m.model_fields.items() if not f.description] == []


def test_the_page_of_settings_is_the_schemas():
    assert read("configuration.md") == markdown(), "run: mlx-rl schema --markdown -o docs/configuration.md"


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_a_section_with_what_it_prints(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", read("cli.md"), flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    assert f"mlx-rl {name}" in section[1]


def test_the_page_of_commands_shows_options_that_there_are():
    known = {option for command in commands().values() for part in command.params for option in part.opts}
    known |= {"--help", "--install-completion"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", read("cli.md"))) <= known


@pytest.mark.parametrize(
    ("registry", "page"),
    [(RewardRegistry, "rewards.md"), (EvaluatorRegistry, "evaluation.md")],
    ids=["rewards", "evaluators"],
)
def test_every_plugin_of_ours_is_named_in_its_page(registry, page):
    ours = [name for name in registry.names() if registry[name].__module__.startswith(("rewards.", "pipeline."))]
    assert [name for name in ours if f"`{name}`" not in read(page) and f"### {name}" not in read(page)] == []
    assert ours


def test_every_preset_is_named():
    assert [name for name in GRPO_PRESETS if f"`{name}`" not in read("algorithms.md")] == []


def experiments() -> list[tuple[str, str]]:
    """The YAML blocks that say on their first line that they are experiments."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        found += [(page.name, block) for block in blocks if block.startswith(OPENING)]
    return found


def test_there_are_examples():
    assert len(experiments()) >= 3


@pytest.mark.parametrize("place", range(len(experiments())))
def test_an_example_experiment_loads(place, tmp_path):
    page, block = experiments()[place]
    for file in EXPERIMENTS.glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for plugin in yaml.safe_load(block).get("plugins", []):
        code = re.findall(r"^```python\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
        (tmp_path / plugin).write_text(next(b for b in code if "Registry.register" in b), encoding="utf-8")
    file = tmp_path / "an_example.yaml"
    file.write_text(block, encoding="utf-8")
    assert load_entry(file).experiment.name == "an_example"


def test_links_between_pages_lead_somewhere():
    links = [
        (page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    ]
    assert [f"{page.name}: {link}" for page, link in links if not (DOCS / link).exists()] == []
