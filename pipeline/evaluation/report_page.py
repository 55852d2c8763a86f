"""A report as a Markdown page."""

from collections.abc import Mapping, Sequence

from pipeline.evaluation.report import EvaluationReport, Item, Metric


def markdown(report: EvaluationReport, items: Sequence[Item]) -> str:
    """The report as a page: scores, what to beware of, examples, conditions, provenance."""
    head = report.headline
    sections = [
        f"# {report.experiment}: {report.name} after {report.model.stage} (step {report.model.step})",
        f"**{head.name} {format_score(head)}** on {head.n} problems; protocol `{report.task.protocol}`.",
        "\n".join(f"> {warning}" for warning in report.warnings),
        _score_table(report.metrics),
        _facts("Conditions", condition_rows(report)),
        _examples(report, items),
        _facts("Provenance", provenance_rows(report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def headline(report: EvaluationReport) -> str:
    """The score in a line."""
    head = report.headline
    return f"{report.name}: {head.name} {format_score(head)}, n={head.n}"


def format_score(metric: Metric) -> str:
    """`61.2% [58.5, 63.8]` for a share, else `-0.312 [-0.350, -0.274]`: a score and its 95% interval."""
    if metric.share:
        return f"{metric.score:.1%} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
    return f"{metric.score:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def _score_table(metrics: Sequence[Metric]) -> str:
    rows = [
        f"| {m.name} | {format_score(m)} | {'' if m.stderr is None else f'{m.stderr:.4f}'} | {m.interval} | {m.n} |"
        for m in metrics
    ]
    return "\n".join(["| metric | score [95% interval] | stderr | interval | n |", "|---|---|---|---|---|", *rows])


def _facts(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value not in (None, (), {}, "")]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def condition_rows(report: EvaluationReport) -> dict[str, object]:
    """What the score was measured under, in words; empty values are to be left out."""
    generation, prompt, counts = report.generation, report.prompt, report.counts
    dataset = report.dataset
    return {
        "comparability": f"`{report.comparability}`",
        "dataset": f"{dataset.name}, split {dataset.split}, {dataset.items} of {dataset.available} items",
        "dataset sha256": dataset.sha256,
        "prompt": "chat template" if prompt.chat else "plain text",
        "system prompt": prompt.system,
        "few-shot": f"{prompt.few_shot} examples, seed {prompt.few_shot_seed}" if prompt.few_shot else None,
        "sampling": f"temperature {generation.temperature:g}, top-p {generation.top_p:g}, top-k {generation.top_k}, "
        f"min-p {generation.min_p:g}, at most {generation.max_tokens} tokens, {generation.samples} a problem, "
        f"seed {generation.seed}",
        "stop strings": ", ".join(f"`{stop!r}`" for stop in generation.stop),
        "extraction": f"{report.extraction.name} {report.extraction.version}" if report.extraction else None,
        "sandbox": f"{report.executor.backend}, Python {report.executor.python}" if report.executor else None,
        "completions": f"{counts.completions}: {counts.truncated} truncated, {counts.unparseable} unparseable, "
        f"{counts.timed_out} timed out, {counts.crashed} crashed, {counts.unjudged} unjudged, "
        f"{counts.sandbox_error} sandbox errors",
        "failed problems": counts.failed_problems or None,
        "contamination": report.contamination.sentence() if report.contamination else None,
        "notes": " ".join(report.task.notes),
    }


def provenance_rows(report: EvaluationReport) -> dict[str, object]:
    """What made the score, in words; empty values are to be left out."""
    made, timing = report.provenance, report.timing
    rows: dict[str, object] = {"checkpoint": f"`{report.model.path}`", "sha256": report.model.sha256}
    if made is not None:
        rows |= {
            "git": f"{made.git.commit}{' (dirty)' if made.git.dirty else ''}" if made.git.commit else None,
            "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
            "machine": f"{made.device}; {made.system} {made.machine}; Python {made.python}",
        }
    return rows | {
        "started": timing.started,
        "took": f"{timing.seconds:.1f} s, {timing.tokens_per_second:.0f} tokens/s",
    }


def _examples(report: EvaluationReport, items: Sequence[Item], count: int = 3, cap: int = 600) -> str:
    """A few completions of either kind, for a reader to judge the judging."""
    metric = report.task.metric
    scored = [item for item in items if item.samples and item.scores.get(metric) is not None]
    wrong = [item for item in scored if (item.scores[metric] or 0) <= 0][:count]
    right = [item for item in scored if (item.scores[metric] or 0) > 0][:count]
    blocks = [
        f"### {title}: {item.id}\n\nreference: `{_cell(_capped(item.reference or '', 80))}`\n\n"
        + _fenced(_capped(item.samples[0].text, cap))
        for title, group in (("Wrong", wrong), ("Right", right))
        for item in group
    ]
    return "\n\n".join(["## Examples", *blocks]) if blocks else ""


def _capped(text: str, cap: int) -> str:
    return text if len(text) <= cap else text[:cap] + " …"


def _fenced(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines() or [""])
