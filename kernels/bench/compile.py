"""Compiles every Triton kernel for a GPU that need not be there, and holds what it needs against recorded bounds.

    python kernels/bench/compile.py [--only hstu_attention] [--quick] [--record] [--arch 90]

Registers, spilled bytes per thread and shared memory of every variant are printed beside the bounds in
`kernels/bench/resources.json`; the exit code is 1 if one exceeds its bound, has none, or a bound is of no variant.
`--record` writes the bounds anew.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import megarec_kernels
from megarec_kernels.variants import Variant

BOUNDS = Path(__file__).with_name("resources.json")
RESOURCES = ("registers", "spilled_bytes", "shared_bytes")
LIMITS = {"registers": 255, "shared_bytes": 232_448}  # of a thread, of a block on sm_90


def all_variants() -> Iterator[Variant]:
    """The variants of every op that has Triton kernels: its module `variants` says them."""
    root = Path(megarec_kernels.__file__).parent
    for path in sorted(root.glob("*/variants.py")):
        yield from importlib.import_module(f"megarec_kernels.{path.parent.name}.variants").variants()


def compile_variant(variant: Variant, arch: int) -> dict[str, int]:
    """Compiles one variant and reads what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = set(names) ^ (set(variant.types) | set(variant.constants))
    if unknown:
        raise ValueError(f"{variant.name}: arguments {sorted(unknown)} are not those of the kernel")
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _read_cubin(compiled.asm["cubin"])
    return {"registers": registers, "spilled_bytes": stack, "shared_bytes": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {said.stdout!r}")
    return int(found[1]), int(found[2])


def complaints(found: dict[str, dict[str, int]], bounds: dict[str, dict[str, int]]) -> list[str]:
    """What is above its bound, has no bound, or is a bound of nothing."""
    said = [f"{name}: has no recorded bound; look at it, then --record" for name in found if name not in bounds]
    for name, needs in found.items():
        for resource, value in needs.items():
            if value > bounds.get(name, needs)[resource]:
                said.append(f"{name}: {value} {resource}, recorded bound {bounds[name][resource]}")
            if value > LIMITS.get(resource, value):
                said.append(f"{name}: {value} {resource}, the hardware has {LIMITS[resource]}")
    return said


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose name starts so")
    parser.add_argument("--quick", action="store_true", help="the first variant of every kernel")
    parser.add_argument("--record", action="store_true", help="write the bounds anew")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, without the point")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the compiler off; unset it")
    everything = list(all_variants())
    names = [variant.name for variant in everything]
    if len(set(names)) < len(names):
        parser.error(f"variants share a name: {sorted({name for name in names if names.count(name) > 1})}")
    chosen = [variant for variant in everything if variant.name.startswith(args.only)]
    if args.quick:
        chosen = list({variant.kernel: variant for variant in reversed(chosen)}.values())
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant, needs in zip(
            chosen, pool.map(lambda variant: compile_variant(variant, args.arch), chosen), strict=True
        ):
            found[variant.name] = needs
            print(f"{variant.name:64} " + "  ".join(f"{name} {needs[name]:6}" for name in RESOURCES), flush=True)
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8")) if BOUNDS.exists() else {}
    if args.record:
        kept = {name: bound for name, bound in bounds.items() if name in names} | found
        BOUNDS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
        return 0
    said = complaints(found, bounds)
    said += [f"{name}: a bound of no variant; --record takes it out" for name in bounds if name not in names]
    print("\n".join(said) or f"{len(found)} variants within their bounds", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    raise SystemExit(main())
