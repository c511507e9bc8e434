"""Fetches transformers' common tests, of its source distribution; `test_transformers_common.py` runs them."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).resolve().parents[1] / ".cache"
UPSTREAM = CACHE / f"transformers-{VERSION}" / "tests"


def download(folder: str) -> Path:
    """The source distribution, as pip is configured to find it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    source = ["--no-deps", "--no-binary", "transformers", "--dest", folder, f"transformers=={VERSION}"]
    subprocess.run([*pip, *source], capture_output=True, text=True, check=True)
    return next(Path(folder).glob("transformers-*.tar.gz"))


def unpack(archive: Path, target: Path):
    """Its tests as the folder `target`, which is there as a whole or not at all."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, tarfile.open(archive) as source:
        members = [member for member in source if Path(member.name).parts[1:2] == ("tests",)]
        source.extractall(folder, members=members, filter="data")
        tests = next(Path(folder).glob("*/tests"))
        # A package, as in the repository: `test_configuration_common.py` reads this file.
        (tests / "__init__.py").touch()
        target.parent.mkdir(exist_ok=True)
        tests.rename(target)


def fetch():
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        unpack(download(folder), UPSTREAM)


def main():
    if UPSTREAM.is_dir():
        return
    try:
        fetch()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"pip exited with {error.returncode}").splitlines()[-1]
        print(f"transformers' common tests are not fetched and will be skipped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
