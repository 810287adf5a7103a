"""The report as a file: HTML that needs nothing else, or Markdown with a picture beside it."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup

from megarec.base.files import new_file
from megarec.base.progress import say
from megarec_tools.report.charts import Chart, draw_svg, style_of, write_sheet
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.content import Content, read_content
from megarec_tools.report.runs import AXES
from megarec_tools.report.tables import Table

BANDS = "A line is the mean over the seeds of a group, its band goes from the lowest to the highest of them."
MARKDOWN_SIGNS = re.compile(r"[\\`*\[\]<>|&~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def write_report(config: ReportConfig) -> None:
    """Reads the runs and writes the file, whole or not at all.

    Raises:
        UserError: a directory is no run, or something else that was named cannot be read.
    """
    content = read_content(config)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".md":
        picture = output.with_suffix(".png")
        charts = [chart for charts in content.curves.values() for chart in charts if chart.axis == AXES[0]]
        write_sheet(picture, charts, names=[group.label for group in content.groups])
        text = markdown(content, picture=picture.name)
    else:
        text = html(content)
    with new_file(output) as staging:
        staging.write_text(text, encoding="utf-8")
    num_runs = sum(len(group.runs) for group in content.groups)
    say(f"{output}: runs {num_runs}, groups {len(content.groups)}, {len(text.encode()) / 1e6:.1f} MB")


def html(content: Content) -> str:
    """The page; everything the runs say is escaped."""
    template = resources.files("megarec_tools.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    drawn = {chart.axis for charts in content.curves.values() for chart in charts}
    axes = [axis for axis in AXES if axis in drawn]
    return environment.from_string(template).render(
        content=content,
        legend=[(group.label, *style_of(place)) for place, group in enumerate(content.groups)],
        axes=axes,
        figures={heading: _figures(charts, axes) for heading, charts in content.curves.items()},
        note=BANDS if _has_bands(content) else "",
        configs=[
            (run.name, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
            for group in content.groups
            for run in group.runs
        ],
    )


def markdown(content: Content, *, picture: str) -> str:
    """The tables of the page, with the curves in the file `picture`; everything the runs say is escaped."""
    tables = [content.summary, *content.results, *([content.settings] if content.settings else [])]
    parts = [f"# {_escaped(content.title)}", *(_markdown_table(table) for table in tables)]
    parts += ["## Curves", f"![The curves of the runs over their steps](<{picture}>)"]
    return "\n\n".join([*parts, BANDS] if _has_bands(content) else parts) + "\n"


def _markdown_table(table: Table) -> str:
    parts = [f"## {_escaped(table.title)}"]
    if table.rows:
        lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in (table.header, *table.rows)]
        parts.append("\n".join([lines[0], "|---|" + "---:|" * (len(table.header) - 1), *lines[1:]]))
    if table.warning:
        parts.append(f"**{_escaped(table.warning)}**")
    if table.notes:
        parts.append(_escaped(" ".join(table.notes)))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """`text` as Markdown that shows exactly it, on one line."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(text.split()))


def _figures(charts: Sequence[Chart], axes: Sequence[str]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Per title its pictures, each with the axes in whose view it is shown; the first stands in for missing ones."""
    by_title: dict[str, list[Chart]] = {}
    for chart in charts:
        by_title.setdefault(chart.title, []).append(chart)
    figures = []
    for title, same in by_title.items():
        own = [chart.axis for chart in same]
        views = [[chart.axis, *((a for a in axes if a not in own) if chart is same[0] else ())] for chart in same]
        pictures = [
            (" ".join(f"on-{axis}" for axis in view), Markup(draw_svg(chart)))
            for chart, view in zip(same, views, strict=True)
        ]
        figures.append((title, pictures))
    return figures


def _has_bands(content: Content) -> bool:
    return any(len(group.runs) > 1 for group in content.groups)
