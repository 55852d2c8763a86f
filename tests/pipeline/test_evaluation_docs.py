"""docs/evaluation.md names what there is, and its example works."""

import re
from pathlib import Path
from typing import get_args

import yaml

from configs.registry import import_source
from configs.schema import EvaluationConfig
from pipeline.evaluation.run import BUILT_IN, EvaluatorRegistry, check_evaluation, evaluate
from tests.pipeline.evaluating import config, context, speak, speaker

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_built_in_evaluator_and_its_options_are_described():
    for cls in BUILT_IN:
        name = next(name for name in EvaluatorRegistry.names() if EvaluatorRegistry[name] is cls)
        section = re.search(rf"^### {name}\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)
        assert section is not None, name
        for option, field in cls.Options.model_fields.items():
            assert f"`{option}`" in PAGE or f"`{option}:" in PAGE, f"{name}: {option}"
            for value in (value for value in get_args(field.annotation) if isinstance(value, str)):
                assert f"`{value}`" in PAGE or f" {value}`" in PAGE, f"{name}: {option}: {value}"


def test_the_example_configuration_is_accepted():
    for entry in yaml.safe_load(blocks("yaml")[0])["evaluations"]:
        check_evaluation(EvaluationConfig.model_validate(entry))


def test_the_example_evaluator_works(tmp_path):
    source = next(block for block in blocks("python") if "spelling" in block)
    (tmp_path / "spelling.py").write_text(source, encoding="utf-8")
    import_source("./spelling.py", tmp_path)
    options = yaml.safe_load(blocks("yaml")[1])["evaluations"][0]["options"]
    answers = {"rhythm": "mhtyhr", "queue": "queue"}
    policy = speaker(lambda prompt, seed: next(a for word, a in answers.items() if word in prompt), tmp_path)
    run_config = config("spelling", options=options)
    report = evaluate(policy, run_config, context=context(), directory=tmp_path / "r", generate=speak)
    assert (report.headline.name, report.headline.score, report.headline.n) == ("exact", 0.5, 2)
