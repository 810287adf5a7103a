"""What training measures between steps: the same evaluation as `megarec-evaluate`, on a share of users per rank."""

from dataclasses import replace

from torch import Tensor

from megarec.inference.evaluate import Tally, tally
from megarec.inference.model import LocalModel, Weights
from megarec.metrics.estimate import Estimate
from megarec.metrics.protocol import Protocol
from megarec.train.trainer import Trainer


class PeriodicEvaluation:
    """Measures a model in training by the protocol of its configuration."""

    def measure(self, trainer: Trainer, dense: dict[str, Tensor], tables: dict[str, Tensor]) -> Tally:
        """What this rank sees of its share of the users."""
        config, world = trainer.config, trainer.groups.world
        model = LocalModel(
            config.model,
            trainer.shape,
            Weights(dense=dense, tables=tables),
            item_side=trainer.dataset.item_side(),
            name=f"step {trainer.step}",
            device=trainer.groups.device,
        )
        return tally(
            model,
            trainer.dataset,
            _protocol(trainer),
            max_users=config.evaluate_users,
            rank=world.rank,
            world=world.size,
        )

    def summarize(self, trainer: Trainer, shares: list[Tally]) -> dict[str, Estimate]:
        """The metrics of the protocol, and of each feedback head with two outcomes the AUC."""
        whole = Tally()
        for share in shares:
            whole.join(share)
        return whole.result("model", trainer.dataset, _protocol(trainer)).reported()


def _protocol(trainer: Trainer) -> Protocol:
    protocol = trainer.config.protocol
    if protocol.max_history_events is None:
        return replace(protocol, max_history_events=trainer.config.max_history_events)
    return protocol
