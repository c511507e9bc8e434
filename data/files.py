"""Files and folders that are written whole or not at all."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory


def check_suffix(path: str | os.PathLike, *suffixes: str) -> None:
    """Refuses a target of another kind; for command lines, before the work that would fill it."""
    if Path(path).suffix not in suffixes:
        raise ValueError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}")


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write` with a path of the same suffix beside `path` and moves the result there: whole or not at all.

    Missing folders are created.

    Raises:
        OSError: the target cannot be written.
    """
    path = Path(path)
    # In the target's own folder: os.replace is atomic only within a file system.
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # of a folder that is none; the reason has been given
            temporary.unlink()


def check_new_folder(folder: Path) -> None:
    """Before the work that would fill it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another --output-dir")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that becomes `folder`, instead of what was there, if the block succeeds; else nothing has changed."""
    folder = Path(os.path.abspath(folder))  # "." has no name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary, folder.name)
        whole.mkdir()
        yield whole
        if folder.exists():
            os.replace(folder, Path(temporary, f"former-{folder.name}"))
        os.replace(whole, folder)


@contextmanager
def files_into(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files replace those of `folder`, one by one, if the block succeeds."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, folder / path.name)
