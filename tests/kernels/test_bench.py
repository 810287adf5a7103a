"""The benchmark: no figure from what is wrong, peers from outside, files, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.bench.attention import attention_work, eighth_lengths, zipf_lengths
from kernels.bench.cases import Case, Draw, Inputs, Work, all_cases
from kernels.bench.harness import alone, clock, command, gate
from kernels.bench.harness.clock import Limits
from kernels.bench.harness.measure import Bench
from kernels.bench.harness.peers import Mistake, load_peers
from kernels.bench.harness.report import table
from kernels.bench.harness.rows import Row

ROOT = Path(__file__).parents[2]
CASES = all_cases()
SMALL = [(op, case) for op, cases in CASES.items() for case in cases if "small" in case.sets]
CPU = torch.device("cpu")
GOOD_PEER = """
from {twin} import softmax_attention_reference as twin

def method(x):
    return twin(x["q"], x["k"], x["v"], x["cu_seqlens"], scale=x["scale"])

def lazy(x):
    raise NotImplementedError("only on Sundays")

def register():
    return {{"softmax_attention": {{"theirs": method, "lazy": lazy}}}}
""".format(twin="megarec_kernels.softmax_attention.reference")


def product(**changes: Any) -> Case:
    def make_inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(8, 8), "weight": draw.normal(8, 8)}

    def truth(inputs: Inputs) -> Tensor:
        return (inputs["x"] @ inputs["weight"]).sin()

    settings: dict[str, Any] = {
        "name": "8x8",
        "sets": frozenset({"small"}),
        "make_inputs": make_inputs,
        "truth": truth,
        "ours": {"ours": truth},
        "baselines": {"eager": truth},
        "gradients": ("x", "weight"),
        "work": lambda x: (Work(flops=1024, bytes=768), Work(flops=2048, bytes=1280)),
    }
    return Case(**settings | changes)


def measure(case: Case, *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Row]:
    settings: dict[str, Any] = {
        "device": CPU,
        "seed": 0,
        "seconds": 0.0,
        "limits": {dtype: Limits(flops=1e12, bytes_per_second=1e11)},
        "peers": {},
        "alone": lambda row: None,
        "advance": lambda what: None,
    }
    return {row.method: row for row in Bench(**settings | changes).measure("product", case, dtype)}


def assert_without_figures(row: Row) -> None:
    assert row.forward is row.backward is row.both is row.peak_mib is None
    assert row.first_step_s == row.ratios == {}


def test_names_of_cases_are_unique_and_their_sets_are_known() -> None:
    for op, cases in CASES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), op
        assert all(case.sets <= {"small", "cpu", "h200"} and case.sets for case in cases), op
        assert any("small" in case.sets for case in cases), f"{op} has no case for this test"


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("hstu_attention", f"b32 n4096 d{width}{biases}") for width in (128, 256) for biases in ("", " biases")),
        *(("hstu_attention", f"b128 n{length} d128") for length in (1024, 2048, 4096)),
        *(("hstu_attention", f"b{users} n{length} d128") for users, length in ((8, 8192), (4, 16384))),
        *(("hstu_attention", f"b{users} zipf1.2 n4096 d128") for users in (32, 128)),
        ("hstu_attention", "b128 mean/max=1/8 n880 d50 biases"),
        ("softmax_attention", "b128 mean/max=1/8 n880 d50"),
        ("hstu_layer", "b32 n4096 width1024"),
        ("hstu_layer", "b16 n8192 width1024 beside a transformer"),
        ("hstu_layer", "b32 n8192 width1024 stochastic length 1.6 beside a transformer"),
    ],
)
def test_the_promised_shapes_are_there(op: str, name: str) -> None:
    assert name in [case.name for case in CASES[op]]


@pytest.mark.parametrize(("op", "case"), SMALL, ids=lambda value: value if isinstance(value, str) else value.name)
def test_every_small_case_is_green(op: str, case: Case) -> None:
    for row in measure(case).values():
        assert row.status == "green" or (row.status == "skipped" and row.method != "ours"), row.why
        if row.status == "green":
            assert row.forward is not None and row.forward.ms > 0
            assert set(row.errors) >= {f"gradient of {name}" for name in case.gradients if row.kind != "beside"}


def scaled(inputs: Inputs) -> Tensor:
    return (inputs["x"] @ inputs["weight"]).sin() * (1 + 1e-5)


def wrong_gradient(inputs: Inputs) -> Tensor:
    right = (inputs["x"] @ inputs["weight"]).sin()
    return right + 1e-4 * (inputs["weight"] - inputs["weight"].detach())


def not_finite(inputs: Inputs) -> Tensor:
    return (inputs["x"] @ inputs["weight"]).sin() / torch.zeros(8)


def of_another_shape(inputs: Inputs) -> Tensor:
    return (inputs["x"] @ inputs["weight"]).sin()[:1]


@pytest.mark.parametrize("kind", ["ours", "baselines", "peers"])
@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (scaled, "output"),
        (wrong_gradient, "gradient of weight"),
        (not_finite, "output"),
        (of_another_shape, "output"),
    ],
)
def test_a_planted_fault_is_red_and_has_no_figure(kind: str, fault: Callable[[Inputs], Tensor], where: str) -> None:
    if kind == "peers":
        rows = measure(product(), peers={"product": {"faulty": fault}})
    else:
        rows = measure(product(**{kind: {"faulty": fault}}))
    row = rows.pop("faulty")
    assert row.status == "red" and where in row.why and "allowed" in row.why
    assert_without_figures(row)
    assert "red: " in table([row]) and row.why in table([row])
    for other in rows.values():
        assert other.status == "green" and "faulty" not in other.ratios


def test_what_fails_is_skipped_or_lacks_memory_says_so() -> None:
    def raises(error: Exception) -> Callable[[Inputs], Tensor]:
        def method(_: Inputs) -> Tensor:
            raise error

        return method

    methods = {
        "skipped": raises(NotImplementedError("needs a newer card")),
        "broken": raises(KeyError("x")),
        "large": raises(torch.OutOfMemoryError("4 TiB")),
        "cut": lambda inputs: (inputs["x"].detach() @ inputs["weight"]).sin(),
    }
    rows = measure(product(baselines=methods))
    said = {name: f"{rows[name].status}: {rows[name].why}" for name in methods}
    assert said == {
        "skipped": "skipped: needs a newer card",
        "broken": "failed: KeyError: 'x'",
        "large": "failed: out of memory",
        "cut": "failed: ValueError: gives no gradient of x",
    }
    for name in methods:
        assert_without_figures(rows[name])
    assert rows["ours"].status == "green"


def test_a_reference_that_fails_leaves_no_figure_at_all() -> None:
    def fails(_: Inputs) -> Tensor:
        raise torch.OutOfMemoryError

    for row in measure(product(truth=fails)).values():
        assert (row.status, row.why) == ("failed", "the reference: out of memory")
        assert_without_figures(row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_integer_is_right_or_wrong_whatever_the_dtype(dtype: torch.dtype) -> None:
    def truth(_: Inputs) -> Tensor:
        return torch.arange(100_000_000, 100_000_008)

    row = measure(product(truth=truth, gradients=(), ours={"ours": lambda x: truth(x) + 1}), dtype=dtype)["ours"]
    assert row.status == "red"


def test_fp32_inside_a_run_in_bf16_is_held_to_the_errors_of_fp32() -> None:
    def make_inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(8, 8).float(), "weight": draw.normal(8, 8).float()}

    truth = product().truth
    methods = {"ours": lambda x: truth(x) * (1 + 1e-4), "right": truth}
    rows = measure(product(make_inputs=make_inputs, ours=methods), dtype=torch.bfloat16)
    assert (rows["ours"].status, rows["right"].status) == ("red", "green")


def test_the_times_of_a_pack_are_bucketed_once_for_all_calls() -> None:
    case = next(case for case in CASES["hstu_attention"] if case.name == "b3 n20 d16 biases")
    inputs = gate.draw_inputs(case, device=CPU, dtype=torch.float32, seed=0)
    on_cuda = inputs | {"q": mock.Mock(device=torch.device("cuda"))}
    with mock.patch("kernels.bench.ops.hstu_attention.hstu_attention") as attend:
        for _ in range(2):
            case.ours["ours"](on_cuda)
    first, second = (call.kwargs["time_buckets"] for call in attend.call_args_list)
    assert first is second is not None


def test_a_method_that_fails_only_later_has_no_figure() -> None:
    def fails_on_other_inputs(inputs: Inputs) -> Tensor:
        if float(inputs["x"].detach()[0, 0]) != first:
            raise RuntimeError("illegal address")
        return product().truth(inputs)

    first = float(gate.draw_inputs(product(), device=CPU, dtype=torch.float32, seed=0)["x"].detach()[0, 0])
    row = measure(product(ours={"ours": fails_on_other_inputs}))["ours"]
    assert row.status == "failed"
    assert_without_figures(row)


def test_a_method_that_fails_in_the_rounds_does_not_end_the_run() -> None:
    calls = iter(range(1000))

    def fails_at_last(inputs: Inputs) -> Tensor:
        if next(calls) > 6:
            raise RuntimeError("illegal address")
        return product().truth(inputs)

    for row in measure(product(ours={"ours": fails_at_last})).values():
        assert (row.status, row.why) == ("failed", "in the rounds of all methods: RuntimeError: illegal address")
        assert_without_figures(row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_plain_version_passes_in_every_dtype(dtype: torch.dtype) -> None:
    rows = measure(product(), dtype=dtype)
    assert [row.status for row in rows.values()] == ["green", "green"]


def test_a_method_may_update_its_inputs_in_place() -> None:
    def update(inputs: Inputs) -> Tensor:
        inputs["count"] += 1
        return inputs["weight"].sub_(inputs["count"] * inputs["x"])

    def make_inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(4), "weight": draw.normal(4), "count": torch.zeros(4, dtype=torch.int64)}

    case = product(
        make_inputs=make_inputs, truth=update, ours={"ours": update}, baselines={"again": update}, gradients=()
    )
    rows = measure(case, dtype=torch.float64)
    assert [row.status for row in rows.values()] == ["green", "green"]
    assert rows["ours"].both is None and rows["ours"].backward is None
    assert set(rows["ours"].ratios["again"]) == {"forward"}


def test_a_case_beside_has_its_own_truth_and_is_timed_in_the_same_rounds() -> None:
    other = product(
        name="other", ours={"twice": lambda x: x["x"] * 2}, truth=lambda x: x["x"] + x["x"], gradients=("x",)
    )
    rows = measure(product(beside={"another layer": other}))
    assert rows["another layer"].status == "green" and rows["another layer"].kind == "beside"
    assert set(rows["ours"].ratios) == {"eager", "another layer"}


def test_methods_take_turns() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    times = clock.time_in_turns(calls, device=CPU, seconds=0.0)
    turn = ["a"] * clock.MAX_CALLS_IN_A_ROUND + ["b"] * clock.MAX_CALLS_IN_A_ROUND
    assert called == ["a", "a", "b", "b", *turn * clock.LEAST_ROUNDS]
    assert len(times["a"]) == clock.LEAST_ROUNDS * clock.MAX_CALLS_IN_A_ROUND


def test_figures_are_those_of_the_formula() -> None:
    q = torch.empty(2 * 4096, 4, 128, dtype=torch.bfloat16)
    forward, backward = attention_work(q, q, torch.tensor([0, 4096, 8192]))
    assert forward.flops == 2 * (2 * 4096**2) * 4 * 128
    assert backward.flops == 2.5 * forward.flops
    assert forward.bytes == 4 * q.nbytes
    row = measure(product())["ours"]
    assert row.forward is not None and row.both is not None
    assert row.forward.tflops == pytest.approx(1024 / row.forward.ms / 1e9)
    assert row.both.gbps == pytest.approx((768 + 1280) / row.both.ms / 1e6)
    assert row.forward.share_of_limit == pytest.approx(768 / 1e11 * 1e3 / row.forward.ms)  # of the slower: the copy


def test_lengths() -> None:
    assert max(zipf_lengths(32, 4096)) == 4096 and min(zipf_lengths(32, 4096)) >= 1
    assert zipf_lengths(32, 4096) == zipf_lengths(32, 4096)
    lengths = eighth_lengths(128, 880)
    assert max(lengths) == 880 and sum(lengths) / len(lengths) == pytest.approx(110, rel=0.01)


def test_a_good_peer_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peer.py").write_text(GOOD_PEER, encoding="utf-8")
    arguments = ["softmax_attention", "--shapes", "small", "--device", "cpu", "--no-memory", "--seconds", "0"]
    output = tmp_path / "out"
    assert command.main([*arguments, "--peer", str(tmp_path / "peer.py"), "--output", str(output)]) == 0
    assert "skipped: only on Sundays" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    run, rows = results["run"], {row["method"]: row for row in results["rows"]}
    assert run["torch"] == torch.__version__ and run["command"].startswith("python kernels/bench softmax_attention")
    assert {"device", "triton", "commit", "date", "threads", "seed"} <= run.keys()
    assert run["limits"]["float32"]["tflops"] > 0 and run["limits"]["float32"]["gbps"] > 0
    assert rows["theirs"]["kind"] == "peer" and rows["theirs"]["both"]["ms"] > 0
    assert rows["ours"]["ratios"]["theirs"]["both"] == pytest.approx(
        rows["theirs"]["both"]["ms"] / rows["ours"]["both"]["ms"]
    )
    errors = rows["ours"]["errors"]
    assert set(errors) == {"output", "gradient of q", "gradient of k", "gradient of v"}
    assert all(error["found"] <= error["allowed"] for error in errors.values())
    text = (output / "table.md").read_text(encoding="utf-8")
    assert "| softmax_attention: b3 n20 d16 |" in text and run["command"] in text
    assert (output / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["ratios.png", "results.json", "table.md"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file"),
        ("PEERS = ", "SyntaxError"),
        ("import nothing_of_that_name", "No module named"),
        ("def register():\n    return 3", "needs register() or PEERS"),
        ("x = 1", "needs register() or PEERS"),
        ("PEERS = {'softmax_attention': [len]}", "needs register() or PEERS"),
        ("PEERS = {'hstu_atention': {'a': len}}", "there is no op 'hstu_atention'; there are"),
        ("PEERS = {'softmax_attention': {'ours': len}}", "'ours' is the name of a method of the benchmark"),
        ("PEERS = {'softmax_attention': {'a': 3}}", "'a' is no function, but int"),
    ],
)
def test_a_wrong_peer_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "peer.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        command.main(["--shapes", "small", "--device", "cpu", "--peer", str(path)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and str(path) in lines[0]


def test_two_peers_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("PEERS = {'softmax_attention': {'theirs': len}}", encoding="utf-8")
    with pytest.raises(Mistake, match="is the name of another peer"):
        load_peers([str(tmp_path / "a.py"), str(tmp_path / "b.py")], CASES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["flash_attention"], "there is no op 'flash_attention'; there are "),
        (["--shapes", "h100"], "there is no set 'h100'; there are cpu, h200, small"),
        (["--only", "d999"], "no case of"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--seconds", "-1"], "--seconds must not be negative"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--output", __file__], "is a file, not a directory"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--device", "cuda"])
    assert stop.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err


def test_something_of_ours_in_red_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "all_cases", lambda: {"product": [product(ours={"ours": scaled})]})
    arguments = ["--shapes", "small", "--device", "cpu", "--no-memory", "--seconds", "0", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "red: output: error" in capsys.readouterr().out
    row = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"][0]
    assert row["status"] == "red" and row["forward"] is row["both"] is None
    assert not (tmp_path / "ratios.png").exists()
    monkeypatch.setattr(command, "all_cases", lambda: {"product": [product(baselines={"eager": wrong_gradient})]})
    assert command.main(arguments) == 0


def test_the_command_lists_and_helps() -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "kernels" / "bench", *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        )
        return done.stdout

    assert "b32 n4096 d256 biases" in run("hstu_attention", "--list", "--shapes", "h200")
    assert "--peer FILE.py" in run("--help") and "--alone" not in run("--help")


def test_the_peak_is_that_of_the_method_in_a_process_of_its_own() -> None:
    held = torch.ones(1 << 28)  # 1 GiB here, which must not count there
    held += 1
    task = alone.Task(
        runs="method", op="softmax_attention", case="b3 n20 d16", method="ours", dtype="float32", device="cpu", seed=0,
        threads=1,
    )  # fmt: skip
    found = alone.run_alone(task)
    assert found["mib"] is not None and 0 <= found["mib"] < 20
    assert found["seconds"] is not None and found["seconds"] > 0
    with pytest.raises(RuntimeError, match="in a process of its own: StopIteration"):
        alone.run_alone(alone.replace(task, case="none of this name"))


def test_first_steps_are_one_without_and_one_with_the_kernels_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, int]] = []

    def fake(task: alone.Task, environment: dict[str, str]) -> dict[str, float]:
        folder = Path(environment["TRITON_CACHE_DIR"])
        files = len(list(folder.iterdir())) if folder.exists() else 0
        if task.runs == "method":
            folder.mkdir(exist_ok=True)
            (folder / "kernel").touch()
        seen.append((task.runs, str(folder), files))
        return {"mib": 0.0, "seconds": float(len(seen))}

    monkeypatch.setattr(alone, "run_alone", fake)
    task = alone.Task(runs="method", op="", case="", method="ours", dtype="float32", device="cpu", seed=0, threads=1)
    assert alone.measure_first_steps(task) == {"nothing": 1.0, "cold": 2.0, "warm": 3.0}
    assert [(runs, files) for runs, _, files in seen] == [("nothing", 0), ("method", 0), ("method", 1)]
    assert len({folder for _, folder, _ in seen}) == 1 and not Path(seen[0][1]).exists()
