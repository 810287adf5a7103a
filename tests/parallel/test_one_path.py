"""There is one way to train, for one process and for many: Megatron-Core's schedule, DDP and optimizer."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megarec"
# What a second path would be made of, and the only files that may hold it.
MARKS = {
    r"\.backward\(": set(),
    r"torch\.autograd\.(grad|backward)\(": set(),
    r"torch\.optim\.\w+\(": set(),
    r"nn\.parallel|fully_shard": set(),
    r"get_forward_backward_func": {"parallel/engine.py", "parallel/mcore.py"},
    r"\bDistributedDataParallel\(": {"parallel/engine.py"},
    r"get_megatron_optimizer": {"optim/dense.py", "parallel/mcore.py"},
    r"(from|import) megatron\b": {"parallel/mcore.py"},
    r"nn\.Embedding": set(),
}


def found(mark: str, sources: dict[str, str]) -> set[str]:
    return {name for name, text in sources.items() if re.search(mark, text)}


def sources() -> dict[str, str]:
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("mark", MARKS)
def test_no_second_training_path(mark: str) -> None:
    assert found(mark, sources()) == MARKS[mark]


def test_a_second_path_would_be_seen() -> None:
    planted = {"train/fast.py": "loss = model(x)\nloss.backward()\ntorch.optim.AdamW(p).step()\n"}
    assert found(r"\.backward\(", planted) and found(r"torch\.optim\.\w+\(", planted)
