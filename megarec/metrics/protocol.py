"""What an evaluation measures: named sets of fields, stored beside every number they gave. Imports no torch."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from megarec.base.errors import UserError
from megarec.base.progress import say
from megarec.data.dataset import AskedSplit, Dataset

Name = Literal["default", "hstu_public", "full_filter", "gsasrec", "yambda"]

KINDS = ("hr", "ndcg", "recall", "coverage")
METRIC = re.compile(rf"(?:{'|'.join(KINDS)})@([1-9]\d*)|mrr")
SIX = ("hr@10", "ndcg@10", "hr@50", "ndcg@50", "hr@200", "ndcg@200")  # the columns of the public HSTU tables


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules of one evaluation. Rows under different protocols cannot be compared.

    Every candidate is ranked, and equal scores are ordered by the lower item id. A target that is unknown to the
    dataset's vocabulary, no candidate, or filtered away can never be found and counts as a miss; of unknown ones, each
    event counts as another item.

    Attributes:
        name: the ready set of fields this one started from; `docs/protocols.md` tells of each.
        split: whose targets are asked for: `eval`, or `valid` of a dataset that keeps one from training.
        metrics: what is measured, printed and logged: `hr@k`, `ndcg@k`, `recall@k`, `coverage@k`, `mrr`.
        max_history_events: how many of the newest events the history keeps; None: as many as the model was trained
            with, and all for a baseline that stands alone.
        target_flag: the flag field that must be true of a target, else it is not ranked; None: every target is.
        filter_seen: items that cannot be recommended: `none`, those inside the kept history (`window`), or those of the
            user's whole history (`full`).
        catalog: the candidates: `all` items the dataset knows, those of an item file that nobody touched included, or
            `trained`: items with train events.
        query_time: the time at which the question is asked: `dataset` is the one the split stored (the target's
            own time when the last event is left out, the cut when the log was split by time), `last_event` that
            of the newest known event.
        query_context: the context fields of the question: those of the first `target` (context is known before the
            choice), those of the `last_event`, or `missing`.
        mrr_depth: in `mrr`, a target that is ranked deeper or not found counts as rank `mrr_depth + 1`; None: every
            rank is exact and a target that is not found counts 0.
        split_rule: the rule the dataset must be split by; None: any.
        gap_seconds: the gap before the cut that the dataset must have; None: any.
        validation_users: how many users' second-to-last events the dataset must keep from training for its `valid`
            split; None: any number.
    """

    name: Name = "default"
    split: AskedSplit = "eval"
    metrics: tuple[str, ...] = ("ndcg@10", "hr@10", "ndcg@100", "recall@100", "mrr", "coverage@10")
    max_history_events: int | None = None
    target_flag: str | None = None
    filter_seen: Literal["none", "window", "full"] = "none"
    catalog: Literal["all", "trained"] = "all"
    query_time: Literal["dataset", "last_event"] = "dataset"
    query_context: Literal["target", "last_event", "missing"] = "target"
    mrr_depth: int | None = None
    split_rule: Literal["leave_last_out", "global_time", "user_holdout"] | None = None
    gap_seconds: float | None = None
    validation_users: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_history_events", "mrr_depth"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError("must be at least 1", where=name)
        if len(set(self.metrics)) != len(self.metrics) or not self.metrics:
            raise UserError(f"must name metrics, each once, got {list(self.metrics)}", where="metrics")
        for metric in self.metrics:
            if not METRIC.fullmatch(metric):
                fix = f"A metric is mrr, or one of {', '.join(KINDS)} with a cut-off, such as ndcg@10"
                raise UserError(f"no metric '{metric}'", where="metrics", fix=fix)

    @property
    def cutoffs(self) -> list[int]:
        """The cut-offs of the metrics, growing; empty for `mrr` alone."""
        found = [METRIC.fullmatch(metric) for metric in self.metrics]
        return sorted({int(match[1]) for match in found if match and match[1]})

    @property
    def changed(self) -> list[str]:
        """The fields that are not as in the ready protocol of this name.

        A window that the ready protocol leaves to the model is no change.
        """
        ready = PROTOCOLS[self.name]
        free = {"max_history_events"} if ready.max_history_events is None else set()
        return [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(ready, f.name)]

    @property
    def label(self) -> str:
        """The name, and every changed field with its value: `hstu_public, filter_seen=full`."""
        values = {name: getattr(self, name) for name in self.changed}
        shown = {name: f"[{','.join(v)}]" if isinstance(v, tuple) else v for name, v in values.items()}
        return ", ".join([self.name, *(f"{name}={value}" for name, value in shown.items())])

    def say_of_longer_histories(self, trained: int) -> None:
        """Says where it reads histories longer than `trained` events, which learned positions do not know."""
        asked = self.max_history_events or 0
        if asked > trained:
            say(f"note: histories of up to {asked} events for a model trained on at most {trained}")

    def check(self, dataset: Dataset) -> None:
        """Refuses a dataset that cannot serve this protocol.

        Raises:
            UserError: the dataset is split in another way, or does not have the split or the flag that is asked for.
        """
        found = {
            "split_rule": dataset.split.get("rule"),
            "gap_seconds": dataset.split.get("gap", 0.0),
            "validation_users": dataset.split.get("validation_users", 0),
        }
        keys = {"split_rule": "rule", "gap_seconds": "gap", "validation_users": "validation_users"}
        for name, value in found.items():
            wanted = getattr(self, name)
            if wanted is not None and wanted != value:
                raise UserError(
                    f"the protocol '{self.name}' wants split.{keys[name]}={wanted}, the dataset has {value}",
                    where=str(dataset.path),
                    fix=f"Make the shards anew, or set protocol.{name}=null, which the result will say",
                )
        if not dataset.shards_of(self.split):
            fix = "Make the shards anew, with split.validation_users or split.validation for a valid split"
            raise UserError(f"the dataset has no {self.split} split", where=str(dataset.path), fix=fix)
        info = dataset.fields.get(self.target_flag or "item")
        if info is None or (self.target_flag and (info.kind != "flag" or info.role != "feedback")):
            raise UserError(
                f"the dataset has no feedback flag '{self.target_flag}'",
                where=str(dataset.path),
                fix="Set protocol.target_flag=null if every event of the log is a target, which the result will say",
            )


PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol(),
    "hstu_public": Protocol(
        name="hstu_public",
        metrics=(*SIX, "mrr"),
        max_history_events=200,
        filter_seen="window",
        mrr_depth=2500,
        split_rule="leave_last_out",
        validation_users=0,
    ),
    "full_filter": Protocol(
        name="full_filter",
        metrics=(*SIX, "mrr"),
        max_history_events=200,
        filter_seen="full",
        split_rule="leave_last_out",
    ),
    "gsasrec": Protocol(
        name="gsasrec",
        metrics=("hr@1", "hr@10", "ndcg@10"),
        max_history_events=200,
        filter_seen="full",
        split_rule="leave_last_out",
        validation_users=512,
    ),
    "yambda": Protocol(
        name="yambda",
        metrics=("ndcg@10", "ndcg@100", "recall@10", "recall@100", "coverage@10", "coverage@100"),
        target_flag="listened",
        catalog="trained",
        query_context="last_event",
        split_rule="global_time",
        gap_seconds=1800.0,
    ),
}
