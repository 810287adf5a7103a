"""Every mistake a user can make: the exit code, the message, and that nothing half-made is left."""

import errno
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from megarec_tools.make_shards import command

SCHEMA = {"name": "plain", "user": "user", "item": "item", "timestamp": "time"}
HEADER = "user,item,time\n"


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["megarec-make-shards", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.err.strip().splitlines()[-1] if printed.err.strip() else "", printed.out


@pytest.fixture
def attempt(tmp_path, capsys, monkeypatch):
    """Runs the command over one text; returns exit code, last line of standard error and standard output."""

    def attempt(text, *arguments, name="log.csv", schema=None):
        log = tmp_path / name
        log.write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "schema.yaml").write_text(yaml.safe_dump({**SCHEMA, **(schema or {})}))
        given = {"input": log, "output": tmp_path / "made", "schema": tmp_path / "schema.yaml", "num_processes": 1}
        given |= dict(a.split("=", 1) for a in arguments)
        code, line, out = run(capsys, monkeypatch, *(f"{k}={v}" for k, v in given.items()))
        if code:
            assert not (tmp_path / "made").exists()
            assert not list(tmp_path.glob(".*unfinished*"))
        return code, line, out

    return attempt


def rows(num=40):
    return "".join(f"{n % 5},{n % 7},{1_600_000_000 + n}\n" for n in range(num))


def test_a_good_log_passes(attempt, tmp_path):
    code, _, out = attempt(HEADER + rows())
    assert code == 0
    assert "users 5 users of one event 0 items 7 events 40" in " ".join(out.split())
    assert pq.read_table(tmp_path / "made/rejects.parquet").num_rows == 0


def test_missing_column_names_the_nearest(attempt):
    code, line, _ = attempt("userr,item,time\n" + rows())
    assert code == 2
    assert "no column 'user'" in line and "Did you mean 'userr'?" in line and "log.csv" in line


def test_missing_column_in_parquet(tmp_path, capsys, monkeypatch):
    pq.write_table(pa.table({"uid": [1], "item_idd": [1], "timestamp": [1]}), tmp_path / "l.parquet")
    code, line, _ = run(capsys, monkeypatch, f"input={tmp_path}/l.parquet", f"output={tmp_path}/d", "schema=yambda")
    assert code == 2 and "no column 'item_id'" in line and "'item_idd'" in line


@pytest.mark.parametrize(
    ("row", "reason", "value"),
    [
        ("1,2,yesterday", "'time' is not a time", "yesterday"),
        ("1,2,-5", "'time' is a negative time", "-5"),
        ("1,2,", "no time in 'time'", ""),
        ("1,2,999999999999", "'time' is beyond the year 9999", "999999999999"),
        ("99999999999999999999,2,1600000000", "'user' is beyond 64 bits", "99999999999999999999"),
        ("1,18446744073709551616,1600000000", "'item' is beyond 64 bits", "18446744073709551616"),
        ("1,abc,1600000000", "'item' is not an integer", "abc"),
        ("1,007,1600000000", "'item' is not an integer", "007"),
        (",2,1600000000", "no id in 'user'", ""),
        ("1,2", "the line has another number of values than the header", "1,2"),
        ("1,2,3,4", "the line has another number of values than the header", "1,2,3,4"),
    ],
)
def test_bad_rows_beyond_the_limit(attempt, row, reason, value):
    code, line, _ = attempt(HEADER + rows(20) + row + "\n" + rows(19))
    assert code == 2
    assert f"1 of 40 rows cannot be used (1 x {reason})" in line
    assert "First: row 21 of" in line and f"{reason}: {value!r}" in line
    assert "max_rejects=0.001" in line


def test_bad_rows_within_the_limit_are_kept_apart(attempt, tmp_path):
    bad = "1,2,soon\n\n1,2\n"
    code, _, out = attempt(HEADER + rows(20) + bad + rows(20), "max_rejects=0.1")
    assert code == 0
    assert "'time' is not a time" in out
    assert pq.read_table(tmp_path / "made/rejects.parquet").to_pylist() == [
        {"file": str(tmp_path / "log.csv"), "row": 21, "reason": "'time' is not a time"},
        {
            "file": str(tmp_path / "log.csv"),
            "row": 22,
            "reason": "the line has another number of values than the header",
        },
    ]


@pytest.mark.parametrize("value", ["NaN", "inf", "loud"])
def test_feedback_that_is_no_number(attempt, value):
    field = {"score": {"column": "score", "role": "feedback", "kind": "numeric", "edges": [1, 2]}}
    text = "user,item,time,score\n" + "".join(f"{n % 5},{n % 7},{1_600_000_000 + n},{n}\n" for n in range(20))
    code, line, _ = attempt(f"{text}1,2,1600000000,{value}\n", schema={"fields": field})
    assert code == 2 and "'score' is not a " in line and f"{value!r}" in line


def test_nan_feedback_in_parquet(tmp_path, capsys, monkeypatch):
    values = [50.0] * 10 + [float("nan"), None]
    table = pa.table({"uid": [1] * 12, "item_id": [2] * 12, "timestamp": [3] * 12, "is_organic": [1] * 12,
                      "played_ratio_pct": values})  # fmt: skip
    pq.write_table(table, tmp_path / "l.parquet")
    code, line, _ = run(capsys, monkeypatch, f"input={tmp_path}/l.parquet", f"output={tmp_path}/d", "schema=yambda")
    assert code == 2 and "(1 x 'played_ratio_pct' is not a finite number)" in line and "row 11 of" in line


def test_unknown_schema_and_unknown_key(attempt):
    code, line, _ = attempt(HEADER + rows(), "schema=yamda")
    assert code == 2 and "unknown schema 'yamda'" in line and "'yambda'" in line
    code, line, _ = attempt(HEADER + rows(), "schema=none.yaml")
    assert code == 2 and "no such schema file" in line
    code, line, _ = attempt(HEADER + rows(), schema={"timestmp": "time"})
    assert code == 2 and "unknown key 'timestmp'" in line and "'timestamp'" in line
    code, line, _ = attempt(HEADER + rows(), "users_per_blok=3")
    assert code == 2 and "users_per_blok" in line and "users_per_block" in line
    code, line, _ = attempt(HEADER + rows(), "split.rule=leave_lst_out")
    assert code == 2 and "'leave_last_out'" in line


@pytest.mark.parametrize("text", ["", HEADER, "\n"])
def test_empty_log(attempt, text):
    code, line, _ = attempt(text)
    assert code == 2 and ("no rows" in line or "no header" in line)


def test_empty_parquet_and_all_rows_filtered(attempt, tmp_path, capsys, monkeypatch):
    pq.write_table(
        pa.table({"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64())}), tmp_path / "e.parquet"
    )
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "s", "user": "user", "item": "item"}))
    code, line, _ = run(
        capsys, monkeypatch, f"input={tmp_path}/e.parquet", f"output={tmp_path}/d", f"schema={tmp_path}/s.yaml"
    )
    assert code == 2 and "the log has no rows" in line
    code, line, _ = attempt(HEADER + rows(), schema={"keep": {"item": [99]}})
    assert code == 2 and "no rows to use" in line


def test_truncated_files(attempt, tmp_path, capsys, monkeypatch):
    text = (HEADER + rows(20_000)).encode()
    code, line, _ = attempt(gzip.compress(text)[:-2000], name="log.csv.gz")
    assert code == 2 and "the gzip file is truncated" in line and "log.csv.gz" in line
    code, line, _ = attempt(zstandard.compress(text)[:-20], name="log.csv.zst")
    assert code == 2 and "zstd" in line and "log.csv.zst" in line
    code, line, _ = attempt(b"not gzip at all" * 10, name="log.csv.gz")
    assert code == 2 and "damaged gzip file" in line
    pq.write_table(pa.table({"uid": [1] * 1000}), tmp_path / "l.parquet")
    whole = (tmp_path / "l.parquet").read_bytes()
    (tmp_path / "l.parquet").write_bytes(whole[:-30])
    code, line, _ = run(capsys, monkeypatch, f"input={tmp_path}/l.parquet", f"output={tmp_path}/d", "schema=yambda")
    assert code == 2 and "damaged or truncated Parquet file" in line and "l.parquet" in line


def test_a_column_of_lists_where_one_value_belongs(tmp_path, capsys, monkeypatch):
    ones = [1, 2]
    good = dict.fromkeys(("uid", "item_id", "timestamp", "is_organic", "played_ratio_pct"), ones)
    for column in good:
        pq.write_table(pa.table({**good, column: [[1], [2]]}), tmp_path / "l.parquet")
        code, line, _ = run(capsys, monkeypatch, f"input={tmp_path}/l.parquet", f"output={tmp_path}/d", "schema=yambda")
        assert code == 2 and f"the column '{column}'" in line


def test_damage_inside_parquet(tmp_path, capsys, monkeypatch):
    table = pa.table({n: list(range(1000)) for n in ("uid", "item_id", "timestamp", "is_organic", "played_ratio_pct")})
    pq.write_table(table, tmp_path / "l.parquet", compression="zstd")
    data = bytearray((tmp_path / "l.parquet").read_bytes())
    data[100:3000] = b"\xaa" * 2900
    (tmp_path / "l.parquet").write_bytes(data)
    code, line, _ = run(capsys, monkeypatch, f"input={tmp_path}/l.parquet", f"output={tmp_path}/d", "schema=yambda")
    assert code == 2 and "damaged or truncated Parquet file" in line


def test_output_not_empty(attempt, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    code, line, _ = attempt(HEADER + rows(), f"output={tmp_path}/full")
    assert code == 2 and "the output directory is not empty" in line
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


def test_files_of_different_kinds(attempt, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a.csv").write_text(HEADER + rows())
    (folder / "b.jsonl").write_text("{}")
    code, line, _ = attempt("", f"input={folder}")
    assert code == 2 and "files of different kinds" in line and "a.csv" in line and "b.jsonl" in line
    code, line, _ = attempt("", f"input={tmp_path}/nothing")
    assert code == 2 and "no such file" in line
    code, line, _ = attempt("", f"input=[{folder}/a.csv,{folder}/a.csv]")
    assert code == 2 and "named twice" in line
    code, line, _ = attempt("x", name="log.xlsx")
    assert code == 2 and "does not say the format" in line


def test_ids_of_both_ends_of_64_bits(attempt):
    code, line, _ = attempt(HEADER + rows() + "-1,1,1600000000\n18446744073709551615,1,1600000000\n")
    assert code == 2 and "ids below 0 and ids of 2^63" in line


def test_split_mistakes(attempt):
    code, line, _ = attempt(HEADER + rows(), "split.rule=global_time")
    assert code == 2 and "split.cut" in line
    code, line, _ = attempt(HEADER + rows(), "split.rule=global_time", "split.cut=soon")
    assert code == 2 and "'soon' is not a time" in line
    code, line, _ = attempt(HEADER + rows(), "split.rule=global_time", "split.cut=5")
    assert code == 2 and "nothing to train on" in line and "1600000000" in line
    code, line, _ = attempt(HEADER + rows(), "split.rule=global_time", "split.cut=2030-01-01")
    assert code == 2 and "nothing to evaluate" in line
    for setting in ("duplicates=drop", "equal_times=shuffle"):
        code, line, _ = attempt(HEADER + rows(), setting, schema={"timestamp": None})
        assert code == 2 and f"{setting} needs times" in line


def test_disk_full_is_exit_1_and_leaves_nothing(attempt, monkeypatch):
    def full(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device", "x.tar")

    for where in ("partition.write_batches", "histories.write_columns", "shards.write_shard", "pipeline.write_dataset"):
        with monkeypatch.context() as patch:
            patch.setattr(f"megarec_tools.make_shards.{where}", full)
            code, line, _ = attempt(HEADER + rows())
        assert code == 1 and "no space left on the disk" in line


def test_a_really_full_disk(tmp_path, attempt):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root can make a small disk")
    try:
        for processes in (1, 2):
            code, line, _ = attempt(HEADER + rows(60_000), f"output={disk}/made", f"num_processes={processes}")
            assert code == 1 and "no space left on the disk" in line
            assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bad_json_lines(attempt):
    good = "".join(json.dumps({"user": n % 5, "item": n % 7, "time": n}) + "\n" for n in range(20))
    for line, reason in (
        ("{broken", "no JSON object"),
        ("[1,2]", "no JSON object"),
        ('{"user": {"a": 1}, "item": 1, "time": 1}', "'user' is not an integer"),
        ('{"item": 1, "time": 1}', "no id in 'user'"),
        ('{"user": [1, 2], "item": 1, "time": 1}', "'user' is not an integer"),
        ('{"user": 1, "item": 1, "time": [1]}', "'time' is not a time"),
        ("[" * 100_000, "no JSON object"),
    ):
        code, message, _ = attempt(good + line + "\n", name="log.jsonl")
        assert code == 2 and reason in message and "row 21" in message
    code, message, _ = attempt(good.replace("user", "usr"), name="log.jsonl")
    assert code == 2 and "no column 'user'" in message and "'usr'" in message


def test_bytes_that_are_not_utf_8(attempt):
    good = b"user,item,time\n" + b"".join(b"u%d,caf\xc3\xa9 %d,%d\n" % (n % 3, n, n) for n in range(20))
    code, line, _ = attempt(good + b"u1,caf\xe9,5\n")
    assert code == 2 and "(1 x 'item' is not UTF-8 text)" in line and "row 21 of" in line
    code, line, _ = attempt(good.decode().encode("utf-16"))
    assert code == 2 and "UTF-16" in line


def test_keep_with_values_of_another_type(attempt):
    code, line, _ = attempt(HEADER + rows(), schema={"keep": {"user": ["1.2.3", "x"]}})
    assert code == 2 and "no rows to use" in line


def test_a_schema_file_runs_no_code(tmp_path, capsys, monkeypatch):
    (tmp_path / "s.yaml").write_text("!!python/object/apply:os.system ['touch " + str(tmp_path / "owned") + "']")
    (tmp_path / "log.csv").write_text(HEADER)
    code, line, _ = run(
        capsys, monkeypatch, f"input={tmp_path}/log.csv", f"output={tmp_path}/d", f"schema={tmp_path}/s.yaml"
    )
    assert code == 2 and "not valid yaml" in line
    assert not Path(tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.parquet"])
def test_bytes_that_are_no_log(attempt, name):
    noise = bytes((n * 89 + 17 + n // 256) % 256 for n in range(5000)).replace(b"\n", b"\r")
    code, line, _ = attempt(noise, name=name)
    assert code == 2
    assert name in line and line.isprintable()


def test_no_item_is_frequent_enough(attempt):
    code, line, _ = attempt(HEADER + rows(), "min_item_count=100")
    assert code == 2 and "no item has min_item_count=100 events" in line


@pytest.mark.parametrize(
    ("name", "role"),
    [("time", "context"), ("hash", "context"), ("users", "context"), ("count", "item_side")],
)
def test_a_field_cannot_be_called_as_a_column_of_the_shards_is(attempt, name, role):
    fields = {name: {"column": "place", "role": role, "kind": "categorical"}}
    text = "user,item,time,place\n" + rows().replace("\n", ",home\n")
    code, line, _ = attempt(text, "equal_times=shuffle", schema={"fields": fields})
    assert code == 2
    assert f"the field name '{name}' is taken. Choose another" in line


def test_infer_calls_such_a_field_otherwise(attempt):
    code, _, out = attempt(
        "user,item,timestamp,time\n" + rows().replace("\n", ",noon\n"), "schema=infer", "approve=true"
    )
    assert not code
    assert "field_time:" in out
