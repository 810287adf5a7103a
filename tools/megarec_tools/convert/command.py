"""Turns a training checkpoint into an inference bundle, and proves that both give the same answers.

megarec-convert checkpoint=outputs/run data=my_data output=bundle
"""

from dataclasses import dataclass

from megarec.base.errors import UserError
from megarec.cli.command import run


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert.

    Attributes:
        checkpoint: a run directory, or one of its checkpoints.
        output: the new bundle directory.
        data: the dataset the run was trained on; None: the one its configuration names.
        check_users: users of the eval split on whom checkpoint and bundle must agree.
        tolerance: the largest allowed difference of a score or logit, relative to the largest of its kind.
    """

    checkpoint: str
    output: str
    data: str | None = None
    check_users: int = 64
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.check_users < 1:
            raise UserError("must be at least 1", where="check_users")
        if not 0 <= self.tolerance < 1:
            raise UserError("must be in [0, 1)", where="tolerance")


def main() -> None:
    """Runs `megarec-convert`."""
    run("megarec-convert", ConvertConfig, _work, about=__doc__)


def _work(config: ConvertConfig) -> None:
    from megarec_tools.convert.conversion import convert

    convert(config)


if __name__ == "__main__":
    main()
