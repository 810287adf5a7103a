"""Recommends items from a bundle: raw ids in, raw ids out.

history=FILE   one request in each line (- is standard input):
  {"user": 17, "events": [{"item": 9, "timestamp": 1700000000, ...}, ...],
   "at": 1700000600, "context": {...}, "items": [...]}
  Events hold columns of the log, `context` those of the question and of user files. `at`, `context` and `items` may
  be left out; `items` are the only ones to score, and all of them that the catalog knows come back, whatever k is.
user=ID data=DIR   for one user of a dataset instead, as things stood when the split asked.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from megarec.base.errors import UserError, nearest
from megarec.cli.command import run

if TYPE_CHECKING:
    from megarec.inference.bundle import Bundle
    from megarec.inference.recommend import Answer, Recommender
    from megarec.inference.requests import RawReader

REQUESTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """What to recommend, to whom.

    Attributes:
        bundle: the directory that `megarec-convert` wrote.
        history: a file of requests, or - for standard input.
        user: instead of `history`, a raw user id of the dataset `data`.
        data: the dataset directory of `user`.
        k: items for each request.
        filter_seen: leave out the items of the request's events.
        feedback: add the predicted feedback to each item.
        format: `jsonl`, one answer per line, or a `table` to read.
        output: a file, or - for standard output.
        device: where the model runs: cpu or cuda.
    """

    bundle: str
    history: str = "-"
    user: Any = None
    data: str | None = None
    k: int = 10
    filter_seen: bool = False
    feedback: bool = False
    format: Literal["jsonl", "table"] = "jsonl"
    output: str = "-"
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError("must be at least 1", where="k")
        if (self.user is None) != (self.data is None):
            raise UserError("user and data come together", fix="Give both, or history=FILE")


def main() -> None:
    """Runs `megarec-recommend`."""
    run("megarec-recommend", RecommendConfig, recommend, about=__doc__)


def recommend(config: RecommendConfig) -> None:
    """Answers every request; says on standard error what was unknown."""
    from megarec.base.device import require_device
    from megarec.inference.bundle import open_bundle
    from megarec.inference.recommend import Recommender

    require_device(config.device)
    bundle = open_bundle(Path(config.bundle))
    recommender = Recommender(bundle, device=config.device)
    answers = _answer_file(config, recommender) if config.user is None else _answer_user(config, bundle, recommender)
    with _open_output(config.output) as file:
        for answer in answers:
            text = _as_json(answer) if config.format == "jsonl" else _as_table(answer)
            file.write(text + "\n")
    for note in notes_on(recommender.reader, columns=bundle.catalog.schema.columns()):
        print(f"note: {note}", file=sys.stderr)  # noqa: T201


def _answer_file(config: RecommendConfig, recommender: "Recommender") -> "Iterator[Answer]":
    from megarec.inference.requests import parse_request

    with _open_input(config.history) as file:
        lines = ((number, line) for number, line in enumerate(_decoded(file), start=1) if line.strip())
        while batch := list(islice(lines, REQUESTS_AT_ONCE)):
            requests = [parse_request(line, where=f"line {number}") for number, line in batch]
            yield from recommender.answer(
                requests, k=config.k, filter_seen=config.filter_seen, feedback=config.feedback
            )


def _answer_user(config: RecommendConfig, bundle: "Bundle", recommender: "Recommender") -> "Iterator[Answer]":
    from megarec.data.dataset import open_dataset
    from megarec.inference.users import find_user

    dataset = open_dataset(config.data or "")
    if dataset.fields != bundle.config.fields:
        raise UserError("the bundle was made from another dataset", where=str(config.data), fix="Give its own")
    histories = find_user(dataset, config.user)
    yield from recommender.answer_histories(
        histories, users=[config.user], k=config.k, filter_seen=config.filter_seen, feedback=config.feedback
    )


def _as_json(answer: "Answer") -> str:
    items: list[dict[str, Any]] = [
        {"item": item, "score": score} for item, score in zip(answer.items, answer.scores, strict=True)
    ]
    for name, values in answer.feedback.items():
        for item, value in zip(items, values, strict=True):
            item.setdefault("feedback", {})[name] = value
    return json.dumps({"user": answer.user, "source": answer.source, "items": items}, ensure_ascii=False)


def _as_table(answer: "Answer") -> str:
    from megarec.cli.evaluation_report import align

    single = [name for name, values in answer.feedback.items() if values and isinstance(values[0], float)]
    header = ["", "item", "score", *(f"P({name})" for name in single)]
    rows = [
        [
            str(place + 1),
            str(item),
            f"{answer.scores[place]:.4f}",
            *(f"{answer.feedback[n][place]:.3f}" for n in single),
        ]
        for place, item in enumerate(answer.items)
    ]
    return f"user {answer.user} (by {answer.source})\n{align([header, *rows])}\n"


def notes_on(reader: "RawReader", *, columns: list[str]) -> list[str]:
    """What `reader` met and could not use; `columns` are those of the log."""
    parts = [f"{count} values of '{name}' are not in the vocabulary" for name, count in reader.unknown.items() if count]
    parts += [
        f"'{name}' is no column of the log ({count} times). {nearest(name, columns)}"
        for name, count in reader.ignored.most_common(5)
    ]
    if reader.dropped_events:
        parts.append(f"{reader.dropped_events} events left out by the schema's filter")
    return parts


def _decoded(file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError("not UTF-8 text", where=f"line {number}") from None


@contextmanager
def _open_input(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    path = Path(name)
    if not path.is_file():
        raise UserError("no such file", where=name, fix="Give history=FILE, or - for standard input")
    with path.open("rb") as file:
        yield file


@contextmanager
def _open_output(name: str) -> Iterator[IO[str]]:
    if name == "-":
        yield sys.stdout
        return
    from megarec.base.files import new_file

    with new_file(Path(name)) as staging, staging.open("w", encoding="utf-8") as file:
        yield file


if __name__ == "__main__":
    main()
