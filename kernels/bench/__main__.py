"""`python kernels/bench`: the kernels of this checkout against named baselines; `--help` says more."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]  # what is measured is this checkout, installed or not

from kernels.bench.harness.command import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
