"""Published numbers that the user quotes beside measured ones.

```yaml
HSTU (its authors):
  hr@10: 0.3097
  ndcg@10: 0.1720
  protocol: hstu_public    # needed when a page has tables of several protocols
  source: README of generative-recommenders, April 2024
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarec.base.errors import UserError, nearest
from megarec_tools.report.measurements import Rules
from megarec_tools.report.runs import read_yaml


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One quoted row.

    Attributes:
        name: what it is called.
        values: by metric.
        protocol: under which it was measured, as its source says; None: the only one of the page.
        source: where it was published.
    """

    name: str
    values: dict[str, float]
    protocol: str | None = None
    source: str = ""


def read_references(path: Path) -> list[Reference]:
    """The quoted rows of a yaml or JSON file.

    Raises:
        UserError: the file is broken, or a metric is no number from 0 to 1.
    """
    found = []
    for name, entry in read_yaml(path, what="file of references").items():
        if not isinstance(entry, dict):
            raise UserError("not a mapping of metrics to numbers", where=f"{path}, {name}")
        texts = {key: str(entry[key]) for key in ("protocol", "source") if key in entry}
        values = {}
        for metric, value in entry.items():
            if metric in texts:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UserError(f"{value!r} is not a number from 0 to 1", where=f"{path}, {name}.{metric}")
            values[str(metric)] = float(value)
        if not values:
            raise UserError("quotes no metric", where=f"{path}, {name}")
        found.append(Reference(name=str(name), values=values, **texts))
    return found


def place_references(references: Sequence[Reference], tables: Sequence[Rules]) -> dict[Rules, list[Reference]]:
    """Which quoted rows stand in the table of which rules; only targets of the eval split were published.

    Raises:
        UserError: a row fits no table, or more than one.
    """
    placed: dict[Rules, list[Reference]] = {}
    for reference in references:
        fitting = [r for r in tables if r.split == "eval" and reference.protocol in (None, r.protocol)]
        if len(fitting) != 1:
            what = "fits no table" if not fitting else f"fits {len(fitting)} tables"
            names = sorted({rules.protocol for rules in tables})
            fix = nearest(str(reference.protocol), names) if not fitting else "Name its protocol, or report fewer runs"
            raise UserError(f"the quoted row '{reference.name}' {what}", where="references", fix=fix)
        placed.setdefault(fitting[0], []).append(reference)
    return placed
