"""All baselines of a dataset, fitted on its train split in one go."""

from collections.abc import Iterator

from megarec.base.progress import track
from megarec.data.block import Block
from megarec.data.dataset import Dataset
from megarec.data.reader import BlockReader
from megarec.inference.baselines.config import BaselineConfig
from megarec.inference.baselines.feedback import FeedbackRates, count_feedback
from megarec.inference.baselines.next_item import ItemNeighbours, Popularity, TrainEvents, Transitions
from megarec.inference.histories import Predictor


def fit_baselines(dataset: Dataset, config: BaselineConfig) -> Iterator[Predictor]:
    """Every baseline the dataset allows, one at a time: decay needs times, rates need feedback fields."""
    num_ids = dataset.fields["item"].num_ids
    events = TrainEvents.gather(train_blocks(dataset, title="read train events"), num_items=num_ids)
    yield Popularity.most_popular(events)
    if dataset.has_timestamps:
        yield Popularity.decayed(events, half_life_days=config.half_life_days)
    yield Transitions.fit(events, config)
    yield ItemNeighbours.fit(events, config)
    classes = {
        name: info.num_ids - 1
        for name, info in dataset.fields.items()
        if info.role == "feedback" and info.slots == 1 and info.num_ids > 2
    }
    if classes:
        counts = count_feedback(train_blocks(dataset, title="read feedback"), num_items=num_ids, classes=classes)
        yield FeedbackRates(by="item", counts=counts, prior_events=config.prior_feedback)
        yield FeedbackRates(by="user", counts=counts, prior_events=config.prior_feedback)


def train_blocks(dataset: Dataset, *, title: str) -> Iterator[Block]:
    """The blocks of the train split, in order, with a progress bar."""
    reader = BlockReader(dataset, "train")
    for number in track(range(reader.num_blocks), title=title, total=reader.num_blocks, unit="blocks"):
        yield reader.read(number)
