"""The command line of the benchmark."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from kernels.bench.cases import Case, all_cases, name_of
from kernels.bench.harness.alone import Task, measure_first_steps, perform, run_alone
from kernels.bench.harness.clock import measure_limits
from kernels.bench.harness.measure import Bench
from kernels.bench.harness.peers import Mistake, load_peers
from kernels.bench.harness.report import describe, draw_ratios, table, table_of_ratios, write_results
from kernels.bench.harness.rows import Row

DTYPES = {name_of(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

ABOUT = """\
Checks and times every kernel of megarec against named baselines, in one run on one device.

For each case: first the gate (outputs and all gradients against the same mathematics in a wider dtype; at most 2x the
error of the plain version forward, 3x backward), then the median of many calls, the methods in turns. A method whose
gate is red gets words and no number. Shares are of a matrix product and a copy measured in the same run.
"""
EXAMPLES = """\
examples:
  python kernels/bench --list                                   what there is to measure
  python kernels/bench --shapes cpu --output outputs/bench      what two CPU cores can do, with table and picture
  python kernels/bench hstu_attention --device cuda --shapes h200 --peer ~/meta_peer.py --output outputs/h200
  python kernels/bench hstu_attention --only "b32 n4096 d128" --first-step

Exit code 0: all of ours is green; 1: something of ours is red or failed; 2: the command line or a peer is wrong.
How to add an op: kernels/bench/cases.py. How to write a peer: kernels/bench/README.md.
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def make_parser() -> argparse.ArgumentParser:
    """What `--help` prints."""
    parser = OneLineParser(
        prog="python kernels/bench",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help="the ops to measure; all if none is named")
    add("--device", choices=("cpu", "cuda"), help="cuda if there is one, else cpu")
    add(
        "--dtype",
        nargs="+",
        choices=(*SHORT, *DTYPES),
        metavar="DTYPE",
        help="bf16 on cuda, fp32 on cpu; or fp16, fp64",
    )
    add("--shapes", nargs="+", metavar="SET", help="sets of shapes: h200 (on cuda), cpu (on cpu), small (milliseconds)")
    add("--only", metavar="TEXT", default="", help="only cases whose name has this in it")
    add("--peer", nargs="+", action="extend", default=[], metavar="FILE.py", help="kernels of others to measure beside")
    add("--output", type=Path, metavar="DIR", help="results.json, table.md and ratios.png go there")
    add("--seconds", type=float, default=1.0, help="of timing for each method, forward and both alike (%(default)s)")
    add("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    add("--threads", type=int, metavar="N", help="of torch on the CPU; OMP_NUM_THREADS, else all cores")
    add(
        "--first-step",
        action="store_true",
        help="also seconds from launch to the first step, kernels uncompiled and compiled",
    )
    add("--no-memory", action="store_true", help="on a CPU: skip the peak memory, which takes a process per method")
    add("--list", action="store_true", help="print ops, cases, their sets and methods, and stop")
    add("--alone", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.alone:
        perform(args.alone)
        return 0
    cases = all_cases()
    try:
        chosen = choose(args, cases)
        if args.list:
            print_list(chosen)
            return 0
        peers = load_peers(args.peer, cases)
    except Mistake as mistake:
        parser.error(str(mistake))
    if args.threads:
        torch.set_num_threads(args.threads)
    args.command = ["python", "kernels/bench", *(sys.argv[1:] if arguments is None else arguments)]
    rows = measure_all(args, chosen, peers)
    return int(any(row.kind == "ours" and row.status in ("red", "failed") for row in rows))


def choose(args: argparse.Namespace, cases: dict[str, list[Case]]) -> list[tuple[str, Case]]:
    """The cases that were asked for; fills in what depends on the device.

    Raises:
        Mistake: names what does not exist.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: torch sees no CUDA device here; --device cpu works")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = list(dict.fromkeys(SHORT.get(name, name) for name in args.dtype or [])) or (
        ["bfloat16"] if args.device == "cuda" else ["float32"]
    )
    unknown = [op for op in args.ops if op not in cases]
    if unknown:
        raise Mistake(f"there is no op {unknown[0]!r}; there are {', '.join(cases)}")
    sets = set().union(*(case.sets for named in cases.values() for case in named))
    wanted = set(args.shapes or (sets if args.list else {"h200"} if args.device == "cuda" else {"cpu"}))
    if not wanted <= sets:
        raise Mistake(f"--shapes: there is no set {min(wanted - sets)!r}; there are {', '.join(sorted(sets))}")
    if args.seconds < 0:
        raise Mistake(f"--seconds must not be negative, got {args.seconds:g}")
    if args.threads is not None and args.threads < 1:
        raise Mistake(f"--threads must be at least 1, got {args.threads}")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise Mistake(f"--output {args.output}: is a file, not a directory")
    ops = list(dict.fromkeys(args.ops)) or list(cases)
    chosen = [(op, case) for op in ops for case in cases[op] if case.sets & wanted and args.only in case.name]
    if not chosen:
        raise Mistake(
            f"no case of {', '.join(ops)} in {', '.join(sorted(wanted))} has {args.only!r} in its name (--list)"
        )
    return chosen


def print_list(chosen: list[tuple[str, Case]]) -> None:
    """One line per case."""
    for op, case in chosen:
        methods = ", ".join([*case.ours, *case.baselines, *case.beside])
        print(f"{op:24} {case.name:36} [{', '.join(sorted(case.sets))}]  {methods}")


def measure_all(args: argparse.Namespace, chosen: list[tuple[str, Case]], peers: dict[str, Any]) -> list[Row]:
    """Measures and prints case by case; after each, what is known so far is on disk."""
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # the gate's truth may be in fp32
    dtypes = [DTYPES[name] for name in args.dtype]
    limits = {dtype: measure_limits(device, dtype) for dtype in dtypes}
    run = describe_run(args) | {
        "limits": {
            name_of(dtype): {"tflops": limit.flops / 1e12, "gbps": limit.bytes_per_second / 1e9}
            for dtype, limit in limits.items()
        }
    }
    print(f"{describe(run)}\n", flush=True)
    rows: list[Row] = []
    with tqdm(unit="step", dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 30) as bar:

        def advance(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        bench = Bench(
            device=device, seed=args.seed, seconds=args.seconds, limits=limits, peers=peers,
            alone=lambda row: measure_alone(row, args), advance=advance,
        )  # fmt: skip
        bar.total = sum(bench.num_steps(op, case) for op, case in chosen) * len(dtypes)
        for op, case in chosen:
            for dtype in dtypes:
                measured = bench.measure(op, case, dtype)
                rows += measured
                bar.write(f"{table(measured)}\n", file=sys.stdout)
                if args.output:
                    write_results(args.output, run, rows)
    print(table_of_ratios(rows))
    if args.output:
        draw_ratios(args.output / "ratios.png", run, rows)
    return rows


def measure_alone(row: Row, args: argparse.Namespace) -> None:
    """Peak memory on a CPU and the first step, into the row."""
    task = Task(
        runs="method", op=row.op, case=row.case, method=row.method, dtype=row.dtype, device=args.device, seed=args.seed,
        threads=torch.get_num_threads(), peers=tuple(args.peer),
    )  # fmt: skip
    if args.device == "cpu" and not args.no_memory:
        row.peak_mib = run_alone(task)["mib"]
    if args.first_step and row.kind == "ours":
        row.first_step_s = measure_first_steps(task)


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Where, with what and how, for the files."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
        "command": shlex.join(args.command),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "seconds": args.seconds,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.machine()}, {os.cpu_count()} cores)"


def _commit() -> str:
    """With a plus sign if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
