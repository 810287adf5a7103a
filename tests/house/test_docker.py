"""What a linter of Dockerfiles cannot know: the files of this repository and the versions it works with.

That bases and packages are pinned at all and that no image ends as root is hadolint's (`make lint`); a test plants
those faults to see that it is switched on.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PINNED = re.compile(r"(?<![\w-])([A-Za-z][\w.-]*)==([\w.]+)")


def instructions(path: Path) -> list[str]:
    """The instructions of a Dockerfile, each on one line, without comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def pins(text: str) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PINNED.findall(text)}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"].values()
    return [Requirement(line) for line in [*project["dependencies"], *(line for lines in optional for line in lines)]]


def test_there_are_two_images() -> None:
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_here_and_is_not_ignored(path: Path) -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [line.split()[1:-1] for line in instructions(path) if line.startswith("COPY ") and "--from=" not in line]
    sources = [word for words in copied for word in words if not word.startswith("--")]
    assert {"pyproject.toml", "constraints.txt", "megarec", "kernels", "tools"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_versions_are_those_of_the_project(path: Path) -> None:
    found = pins("\n".join(instructions(path)))
    known = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert found["torch"] == known["torch"]
    for name, version in found.items():
        assert known.get(name, version) == version, name
        for requirement in requirements():
            if requirement.name == name:
                assert version in requirement.specifier, requirement


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_comes_from_elsewhere_is_known_by_its_commit(path: Path) -> None:
    lines = instructions(path)
    assert not any(line.startswith("ADD ") for line in lines)
    sources = re.findall(r"git\+\S+", "\n".join(lines))
    assert all(re.fullmatch(r"git\+https://\S+@[0-9a-f]{40}\"?", source) for source in sources), sources


def test_what_belongs_together_in_the_cuda_image() -> None:
    found = pins("\n".join(instructions(ROOT / "docker" / "Dockerfile.cuda")))
    assert found["transformer-engine"] == found["transformer-engine-cu13"] == found["transformer-engine-torch"]
    declared = Requirement("transformer-engine>=2.9.0a0,<2.12.0")  # by the metadata of the Megatron-Core below
    assert found["megatron-core"] == "0.16.1"
    assert found["transformer-engine"] in declared.specifier


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_readme_names_the_versions(path: Path) -> None:
    text = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    shown = pins("\n".join(instructions(path)))
    for name, title in {
        "megatron-core": "Megatron-Core",
        "transformer-engine": "Transformer Engine",
        "nvidia-dali-cuda130": "DALI",
        "triton": "Triton",
    }.items():
        assert name not in shown or f"{title} {shown[name]}" in text


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("FROM ubuntu:latest", "DL3007"),
        ("FROM ubuntu", "DL3006"),
        ("FROM ubuntu:24.04\nRUN pip install --no-cache-dir torch", "DL3013"),
        ("FROM ubuntu:24.04\nUSER root", "DL3002"),
    ],
)
def test_the_linter_is_switched_on(tmp_path: Path, line: str, rule: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    (tmp_path / "Dockerfile").write_text(line + "\n", encoding="utf-8")
    command = [hadolint, "--config", str(ROOT / "docker" / "hadolint.yaml"), str(tmp_path / "Dockerfile")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert rule in found.stdout
