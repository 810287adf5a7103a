"""Settings of the tables and of their row-wise optimizers."""

from dataclasses import dataclass
from typing import Literal

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table: `num_rows` rows that start from normal(0, `init_std`)."""

    name: str
    num_rows: int
    init_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How table rows start, and how those that a step touched are updated.

    Attributes:
        init_std: rows start from normal(0, `init_std`).
        kind: `sgd`; `rowwise_adagrad`, one accumulator per row; `adam`, two moments per value; `rowwise_adam`, whose
            second moment is one number per row.
        lr_scale: multiplies the learning rate of the step.
        beta1: decay of the mean of gradients (adam).
        beta2: decay of the mean of squared gradients (adam).
        eps: added to the root.
        weight_decay: decoupled, of touched rows only.
    """

    init_std: float = 0.02
    kind: Literal["sgd", "rowwise_adagrad", "adam", "rowwise_adam"] = "rowwise_adagrad"
    lr_scale: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("init_std", "lr_scale", "eps"):
            if not getattr(self, name) > 0:
                raise UserError("must be above 0", where=name)
        if not self.weight_decay >= 0:
            raise UserError("must not be negative", where="weight_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError("must be in [0, 1)", where=name)
