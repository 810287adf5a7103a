"""Runs that are one experiment with several seeds, and what sets experiments apart."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarec.base.config import flatten
from megarec_tools.report.charts import Line
from megarec_tools.report.runs import Run, dataset_name

OF_A_RUN = ("seed", "run_dir")  # settings that two runs of one group may differ in
SEED_AT_END = re.compile(r"[-_./=]*(?:seed|s)?[-_=]*\d+$")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs with equal settings, each with a seed of its own.

    Attributes:
        name: unique among the groups of a report.
        runs: in the order they were named.
        settings: the flat configuration they share.
    """

    name: str
    runs: tuple[Run, ...]
    settings: dict[str, str]

    @property
    def label(self) -> str:
        """The name, and how many seeds stand behind it."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: over seeds.
        deviation: the sample standard deviation (n - 1); None for one seed.
        count: seeds.
    """

    mean: float
    deviation: float | None
    count: int


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Puts runs that differ only in `seed`, `run_dir` and the path of the same dataset into one group.

    A seed that comes again is no new draw: such a run starts a group of its own.
    """
    members: list[tuple[dict[str, str], list[Run]]] = []
    for run in runs:
        settings = _settings(run)
        for shared, others in members:
            if shared == settings and str(run.config.get("seed")) not in [str(o.config.get("seed")) for o in others]:
                others.append(run)
                break
        else:
            members.append((settings, [run]))
    names = [_name(others) for _, others in members]
    return [
        Group(
            name=name if names.count(name) == 1 else others[0].name,
            runs=tuple(others),
            settings=settings,
        )
        for name, (settings, others) in zip(names, members, strict=True)
    ]


def differing_settings(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Every setting that is not the same in all groups, with its value in each; `-` where a group lacks it."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    rows = [(key, [group.settings.get(key, "-") for group in groups]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one number per seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, count=len(values))


def join_curves(group: Group, curve: Callable[[Run], dict[float, float]], *, axis: str) -> Line | None:
    """The mean of the runs' curves with their lowest and highest value, at the steps that all of them have.

    A mean over fewer runs from some step on would jump there and say nothing of the model. A run without any point
    takes no part.

    Args:
        group: the runs.
        curve: values by step.
        axis: one of `AXES`; a point lies at the mean place of its runs.
    """
    curves = [(run, points) for run in group.runs if (points := curve(run))]
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(points) for _, points in curves)))
    places = [run.places(steps, axis) for run, _ in curves]
    if not all(places):
        return None
    values = [[points[step] for _, points in curves] for step in steps]
    return Line(
        x=[statistics.fmean(of_step) for of_step in zip(*places, strict=True)],
        y=[statistics.fmean(of_step) for of_step in values],
        low=[min(of_step) for of_step in values],
        high=[max(of_step) for of_step in values],
    )


def _settings(run: Run) -> dict[str, str]:
    flat = {key: value for key, value in flatten(run.config).items() if key not in OF_A_RUN}
    settings = {key: "" if value is None else str(value) for key, value in flat.items()}
    return settings | {"data": dataset_name(flat["data"])} if "data" in flat else settings


def _name(runs: Sequence[Run]) -> str:
    """What the names of the runs are without the number of the seed at their end, if that is the same."""
    if len(runs) == 1:
        return runs[0].name
    shared = {SEED_AT_END.sub("", run.name) for run in runs}
    return shared.pop() if len(shared) == 1 and "" not in shared else runs[0].name
