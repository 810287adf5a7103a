"""What training measures between steps: the same evaluation as `megarec-evaluate`, on a share of users per rank."""

from torch import Tensor

from megarec.inference.evaluate import Tally, tally
from megarec.inference.model import LocalModel, Weights
from megarec.inference.protocol import Protocol
from megarec.train.trainer import Trainer


class EvalSplit:
    """Measures a model in training on the eval split of its dataset."""

    def measure(self, trainer: Trainer, dense: dict[str, Tensor], tables: dict[str, Tensor]) -> Tally:
        """What this rank sees of its share of the users."""
        model = LocalModel(
            trainer.config.model,
            trainer.shape,
            Weights(dense=dense, tables=tables),
            item_side=trainer.dataset.item_side(),
            name=f"step {trainer.step}",
            device=trainer.groups.device,
        )
        world = trainer.groups.world
        limit = -(-trainer.config.evaluate_users // world.size)
        return tally(model, trainer.dataset, _protocol(trainer), max_users=limit, rank=world.rank, world=world.size)

    def summarize(self, trainer: Trainer, shares: list[Tally]) -> dict[str, float]:
        """NDCG and hit rate at 10, and of each feedback head the AUC."""
        whole = Tally()
        for share in shares:
            whole.join(share)
        metrics = whole.result("model", trainer.dataset, _protocol(trainer)).flat()
        return {name: value for name, value in metrics.items() if name in ("ndcg@10", "hr@10") or name.endswith("/auc")}


def _protocol(trainer: Trainer) -> Protocol:
    return Protocol(max_history_events=trainer.config.stream.max_history_events)
