"""A machine without Triton imports every op: kernels are imported where they are launched."""

import subprocess
import sys
from pathlib import Path

import megarec_kernels

OPS = sorted(path.parent.name for path in Path(megarec_kernels.__file__).parent.glob("*/__init__.py"))


def test_every_op_is_imported() -> None:
    assert {"layer_norm", "hstu_attention"} <= set(OPS)
    program = "import sys; sys.modules['triton'] = None\n" + "".join(f"import megarec_kernels.{op}\n" for op in OPS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
