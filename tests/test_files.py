"""Files and folders are written whole or not at all."""

import os
from pathlib import Path

import pytest
from conftest import by_failure

from spaceexploreai.data.files import check_new_folder, check_suffix, files_into, whole_folder, write_atomically

# --- one file ---


@by_failure
@pytest.mark.parametrize("half", [b"", b"half a pict"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_failed_write_leaves_the_folder_as_it_was(tmp_path, failure, half, old):
    path = tmp_path / "fan.png"
    if old is not None:
        path.write_bytes(old)

    def fail_half_way(temporary):
        if half:
            temporary.write_bytes(half)
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, fail_half_way)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {"fan.png": old})


@pytest.mark.parametrize("name", ["fan.png", "scores.json", "bars.csv.gz"])
def test_the_temporary_is_beside_the_target_and_of_its_kind(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("old")
    seen = []

    def write(temporary):
        seen.append(temporary)
        assert Path(name).read_text() == "old"
        temporary.write_text("new")

    for path in (tmp_path / name, str(tmp_path / name), name):
        Path(name).write_text("old")
        write_atomically(path, write)
        assert Path(name).read_text() == "new"
    assert os.listdir(tmp_path) == [name]
    assert {temporary.absolute().parent for temporary in seen} == {tmp_path}
    assert all(temporary.name.endswith(f".{name}") for temporary in seen)  # readers and writers go by the suffix
    assert len({temporary.name for temporary in seen}) == 3  # two writers at once must not share it


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*fan\.png: No such file or directory$"):
        write_atomically(tmp_path / "fan.png", lambda temporary: None)
    assert os.listdir(tmp_path) == []


def test_a_writers_error_is_one_line_naming_the_target(tmp_path):
    def fail(_):
        raise OSError("image file is truncated")  # no errno, so no strerror

    with pytest.raises(OSError, match=r"^cannot write .*fan\.png: image file is truncated$") as error:
        write_atomically(tmp_path / "fan.png", fail)
    assert str(tmp_path / "fan.png") in str(error.value)


def test_write_atomically_makes_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "report.json"
    write_atomically(path, lambda temporary: temporary.write_text("{}"))
    assert path.read_text() == "{}"
    assert os.listdir(path.parent) == ["report.json"]


def test_a_target_below_a_file_is_refused_before_its_writer_runs(tmp_path):
    (tmp_path / "file").write_text("")
    called = []
    with pytest.raises(OSError, match=r"^cannot write .*: (File exists|Not a directory)$") as error:
        write_atomically(tmp_path / "file" / "fan.png", called.append)
    assert str(tmp_path / "file" / "fan.png") in str(error.value)
    assert called == []
    assert os.listdir(tmp_path) == ["file"]


def test_check_suffix():
    check_suffix("folder.csv/fan.png", ".png")
    check_suffix(Path("table.csv"), ".parquet", ".csv")
    for path in ("fan.jpg", "fan.PNG", "png", ".png", "fan.png.csv"):
        with pytest.raises(ValueError, match=rf"^cannot write {path}: its name must end in \.png$"):
            check_suffix(path, ".png")


# --- a folder ---


def fail_within(context, name: str, failure: BaseException) -> None:
    with context as folder:
        (folder / name).write_text("half")
        raise failure


@pytest.mark.parametrize("relative", [True, False])
def test_a_whole_folder_is_there_when_it_is_whole(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    folder = Path("made", "folder") if relative else tmp_path / "made" / "folder"
    with whole_folder(folder) as whole:
        (whole / "inner").mkdir()
        (whole / "inner" / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "inner" / "file").read_text() == "text"
    assert os.listdir(folder.parent) == ["folder"]


def test_a_whole_folder_may_be_the_empty_one_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(Path(".")) as whole:
        (whole / "file").touch()
    assert os.listdir(tmp_path / "here") == ["file"]


@by_failure
def test_a_failed_folder_is_none(tmp_path, failure):
    with pytest.raises(type(failure)):
        fail_within(whole_folder(tmp_path / "folder"), "file", failure)
    assert os.listdir(tmp_path) == []


@by_failure
def test_a_former_folder_is_replaced_whole_or_stays(tmp_path, failure):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(type(failure)):
        fail_within(whole_folder(folder), "new", failure)
    assert os.listdir(folder) == ["old"]
    with whole_folder(folder) as whole:
        (whole / "new").touch()
        assert os.listdir(folder) == ["old"]
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["folder"]


def test_files_take_the_place_of_their_namesakes_alone(tmp_path):
    folder = tmp_path / "made" / "folder"
    with files_into(folder) as temporary:
        (temporary / "one").write_text("1")
        (temporary / "inner").mkdir()
    assert sorted(os.listdir(folder)) == ["inner", "one"]
    (folder / "mine").write_text("mine")
    with files_into(folder) as temporary:
        (temporary / "one").write_text("2")
        assert (folder / "one").read_text() == "1"
    assert {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} == {"one": "2", "mine": "mine"}


@by_failure
def test_files_of_a_failure_are_left_out(tmp_path, failure):
    (tmp_path / "one").write_text("1")
    with pytest.raises(type(failure)):
        fail_within(files_into(tmp_path), "one", failure)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "1"}


def test_what_is_full_is_no_new_folder(tmp_path):
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"^{path} exists and is not an empty folder; choose"):
            check_new_folder(path)
