"""`prepare` where something is in its way: damaged files, wrong use, memory that is given back."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import __main__ as commands
from data_pipelines import builder
from data_pipelines.records import Record
from tests.data_pipelines import custom_files
from tests.data_pipelines.samples_to_store import SomeBad

ROOT = Path(__file__).parents[2]


def store(source: SomeBad, output: Path) -> builder.Report:
    return builder.store(source, output, workers=1, settings={}, shard_records=11)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("harm", ["shard deleted", "shard cut", "keys", "left out", "metadata", "all"])
def test_what_was_damaged_is_written_again(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, shards = tmp_path / "out", 3
    store(SomeBad(33), output)
    before, shard = files(output), output / "some_bad-train.array_record-00001-of-00003"
    match harm:
        case "shard deleted":
            shard.unlink()
        case "shard cut":
            os.truncate(shard, 50)
        case "keys":
            (output / "image_keys.npy").write_bytes(b"")
            shard.unlink()
        case "left out":
            (output / "left_out.jsonl").unlink()
        case "metadata":
            (output / "dataset_info.json").unlink()
        case "all":
            for path in output.iterdir():
                if path.name != "prepared.json":
                    path.unlink()
    read: list[int] = []

    class Watched(SomeBad):
        def __getitem__(self, index: int) -> Record:
            read.append(index)
            return super().__getitem__(index)

    report = store(Watched(33), output)
    assert not report.finished_before
    assert capsys.readouterr().err.count("missing or damaged, written again: ") == 1
    assert files(output) == before
    assert not (output / ".prepare").exists()
    if harm.startswith("shard"):
        assert read == list(range(11, 22))
    else:
        assert read == ([] if harm == "metadata" else list(range(11 * shards)))
    assert store(SomeBad(33), output).finished_before


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (
            ["--output", "gs://bucket/out"],
            2,
            "local directory and copied from there, gs://bucket/out is none",
        ),
        (["--output", "taken"], 2, "taken is a file: name a new directory"),
        (["--output", "taken/out"], 1, "cannot write .*taken/out/?.*: Not a directory"),
        (["--output", "/proc/out"], 1, "cannot write /proc/out: No such file or directory"),
        (["--source", "done", "--output", "out"], 2, "done is prepared already"),
        (["--source", "custom:mine.jsonl", "--annotations", "a", "--output", "out"], 2, "leave out --ann"),
        (["--source", "custom:", "--output", "out"], 2, r"custom:FILE\.jsonl"),
        (["--source", "custom:absent.jsonl", "--output", "out"], 2, r"custom: there is no absent\.jsonl"),
        (["--source", "custom:done", "--output", "out"], 2, "custom: cannot read done: Is a directory"),
    ],
)
def test_wrong_use_of_the_command_is_one_line_and_writes_nothing(
    options: list[str],
    status: int,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken", "done/prepared.json", "mine.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    assert commands.main(["prepare", "--source", "shapes", "--workers", "1", *options]) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(told, err)
    assert "Errno" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "mine.jsonl", "taken"]


def test_what_may_not_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions bind no superuser, so the system's refusal is raised in their place."""

    def mkdir(path: Path, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert commands.main(["prepare", "--source", "shapes", "--output", f"{tmp_path}/out"]) == 1
    assert capsys.readouterr().err == f"error: cannot write {tmp_path}/out/.prepare: Permission denied\n"


def test_a_file_of_ones_own_can_be_named_as_in_training(tmp_path: Path) -> None:
    path = custom_files.write_lines(tmp_path / "mine.jsonl", [custom_files.sample()])
    custom_files.write_images(tmp_path)
    options = {"images": None, "output": tmp_path / "out", "workers": 1}
    assert builder.prepare(f"custom:{path}", annotations=None, **options).records == 1
    assert builder.prepare("custom", annotations=path, **options).finished_before


FAULTS = """
import multiprocessing, resource
from data_pipelines.workers import end_with_parent
def work():
    end_with_parent()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(40 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults * resource.getpagesize() >> 20, flush=True)
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
"""


def test_workers_use_the_memory_of_one_image_for_the_next() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) < 3 * 40
