"""Preparing data sets, and reading what was prepared."""

import concurrent.futures
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines import __main__ as commands
from data_pipelines import builder
from data_pipelines.catalog import CATALOG, open_from_root
from data_pipelines.records import Record
from data_pipelines.shapes import Shapes
from data_pipelines.shard_writing import PrepareError
from data_pipelines.stored import Stored
from tests.data_pipelines import data_files
from tests.data_pipelines.samples_to_store import BAD, AllKinds, SomeBad, encoded

ROOT = Path(__file__).parents[2]


def store(source, output: Path, *, workers: int = 1, shard_records: int = 4, **settings) -> builder.Report:
    return builder.store(source, output, workers=workers, settings=settings, shard_records=shard_records)


def fields(record: Record) -> dict:
    """A record as what can be compared."""
    assert isinstance(record.turns, tuple)
    return {**vars(record), "masks": [dict(mask) for mask in record.masks]}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records of all kinds in shards of four."""
    output = tmp_path_factory.mktemp("prepared") / "all_kinds"
    store(AllKinds(10), output)
    return output


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of all sources."""
    root = tmp_path_factory.mktemp("data")
    data_files.write_all(root)
    return root


def test_every_kind_of_record_comes_back_as_it_was(prepared: Path) -> None:
    source, stored = AllKinds(10), Stored(prepared)
    assert (stored.name, len(stored)) == ("all_kinds", 10)
    assert stored.dropped == {"a sample without a turn": 3}
    for index in range(10):
        assert fields(stored[index]) == fields(source[index])


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.annotations])
def test_what_a_source_reads_is_what_is_stored(name: str, data_root: Path, tmp_path: Path) -> None:
    source = open_from_root(name, data_root)
    report = store(source, tmp_path / name)
    stored = Stored(tmp_path / name)
    assert (report.records, dict(report.left_out)) == (len(source), {})
    assert (stored.name, len(stored), stored.dropped) == (name, len(source), source.dropped)
    for index in range(len(source)):
        assert fields(stored[index]) == fields(source[index])


def test_a_rendered_image_keeps_its_pixels(tmp_path: Path) -> None:
    source = Shapes(seed=3, count=3)
    store(source, tmp_path / "shapes")
    stored = Stored(tmp_path / "shapes")
    for index in range(3):
        expected, record = fields(source[index]), fields(stored[index])
        pixels = np.asarray(Image.open(io.BytesIO(record.pop("image"))))
        np.testing.assert_array_equal(pixels, expected.pop("image"))
        assert record == expected


def test_tfds_reads_what_was_prepared(prepared: Path) -> None:
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    assert len(source) == 10
    example = source[4]
    assert example["image"] == encoded(4)
    assert example["turns"]["answer"][0].decode() == " ein Löwe 🦁"
    assert [text.decode() for text in example["masks"]] == [m["counts"] for m in AllKinds(10)[4].masks]
    assert source[1]["image"] is None
    assert [example["sample_id"].decode() for example in source] == [
        r.sample_id for r in map(AllKinds(10).__getitem__, range(10))
    ]
    assert "tensorflow" not in sys.modules


def test_several_processes_write_the_same_files_as_one(prepared: Path, tmp_path: Path) -> None:
    report = store(AllKinds(10), tmp_path / "all_kinds", workers=2)
    assert (report.records, dict(report.left_out)) == (10, {})
    assert files(tmp_path / "all_kinds") == files(prepared)


def test_what_cannot_be_used_is_left_out_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = SomeBad(3 * len(BAD)), tmp_path / "bad"
    report = store(source, output)
    stored = Stored(output)
    good = [index for index in range(len(source)) if index % 3 != 1]
    assert [record.sample_id for record in map(stored.__getitem__, range(len(stored)))] == [
        f"all/{i}" for i in good
    ]
    left_out = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in left_out] == [index for index in range(len(source)) if index % 3 == 1]
    assert left_out[0]["message"] == "no image 1.jpg in /data/1"
    for (_, why), entry in zip(BAD, left_out, strict=True):
        assert why in entry["reason"]
    assert sum(report.left_out.values()) == len(BAD)
    assert stored.dropped == {"a line that is no JSON": 1, **report.left_out}
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{output}: 22 of 33 samples of some_bad, ")
    assert lines[1] == f"left out 11 (33.33%), each of them named in {output / 'left_out.jsonl'}:"
    assert lines[-1] == "        1  a line that is no JSON"
    error = capfd.readouterr().err
    assert "33/33" in error
    assert "11 left out" in error
    assert "Traceback" not in error


def test_a_shard_of_which_nothing_is_kept_does_no_harm(tmp_path: Path) -> None:
    report = store(SomeBad(9), tmp_path / "bad", shard_records=1)
    assert report.records == 6
    assert [Stored(tmp_path / "bad")[i].sample_id for i in range(6)] == [
        f"all/{i}" for i in (0, 2, 3, 5, 6, 8)
    ]
    assert len(tfds.builder_from_directory(tmp_path / "bad").as_data_source("train")) == 6


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    class OnlyBad(SomeBad):
        def __getitem__(self, index: int) -> Record:
            return BAD[0][0](index)

    with pytest.raises(PrepareError, match=r"none of the 5 samples of some_bad .* 5 × no image N.jpg in …"):
        store(OnlyBad(5), tmp_path / "bad")
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["left_out.jsonl"]


@pytest.mark.parametrize(
    ("records", "left_out", "fails"), [(95, 5, False), (94, 6, True), (9, 10, False), (10, 10, True)]
)
def test_more_than_a_twentieth_of_twenty_or_more_samples_is_too_much(
    records: int, left_out: int, fails: bool
) -> None:
    report = builder.Report(Path("x"), "x", records, 0, {"a": left_out - 1, "b": 1}, {})
    assert report.exceeds(builder.MAX_LEFT_OUT) is fails


SLOW = """
from pathlib import Path
from data_pipelines import builder
from tests.data_pipelines import data_files
from tests.data_pipelines.samples_to_store import AllKinds
if __name__ == "__main__":
    source = AllKinds(10, seconds=0.2)
    builder.store(source, {output!r}, workers={workers}, settings={{}}, shard_records=4)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(prepared: Path, tmp_path: Path, workers: int) -> None:
    output = tmp_path / "all_kinds"
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(output=str(output), workers=workers))
    process = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    first = output / ".prepare" / "00000.json"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="is incomplete: run the command that began it again"):
        Stored(output)

    time.sleep(0.5)  # until the workers have seen that their parent is gone
    again = AllKinds(10, watched=tmp_path / "read")
    store(again, output)
    read = [int(line) for line in (tmp_path / "read").read_text().split()]
    assert read[0] >= 4
    assert read[-1] == 9
    assert files(output) == files(prepared)
    assert not (output / ".prepare").exists()


def test_what_is_finished_is_not_done_again(prepared: Path, tmp_path: Path) -> None:
    before = files(prepared)
    report = store(AllKinds(10, watched=tmp_path / "read"), prepared)
    assert report.finished_before
    assert "(finished before)" in str(report)
    assert not (tmp_path / "read").exists()
    assert files(prepared) == before


def test_another_run_into_the_same_directory_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"all_kinds was written from something else: .*samples: 10 then, 11 now"
    ):
        store(AllKinds(11), prepared)
    with pytest.raises(ValueError, match="images: None then, /data now"):
        store(AllKinds(10), prepared, images="/data")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="has other files in it"):
        store(AllKinds(10), tmp_path)
    with pytest.raises(ValueError, match="in a local directory"):
        builder.store(AllKinds(10), "gs://bucket/out", workers=1, settings={})


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    class Nested(AllKinds):
        def __getitem__(self, index: int) -> Record:
            with pytest.raises(ValueError, match="another process is writing"):
                store(AllKinds(4), tmp_path / "out")
            return super().__getitem__(index)

    assert store(Nested(4), tmp_path / "out").records == 4


FULL = """
import resource, sys
from data_pipelines import __main__ as commands
from data_pipelines import catalog
from tests.data_pipelines import data_files
from tests.data_pipelines.samples_to_store import AllKinds
catalog.open_source = lambda name, *, annotations, images: AllKinds(300)
if __name__ == "__main__":
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
    sys.exit(commands.main(["prepare", "--source", "x", "--output", sys.argv[1], "--workers", "1"]))
"""


def test_a_full_disk_is_told_in_a_line_and_the_run_can_go_on(tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk's."""
    script, output = tmp_path / "full.py", tmp_path / "out"
    script.write_text(FULL)

    def run(*limit: str) -> subprocess.CompletedProcess:
        command = [sys.executable, script, output, *limit]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    full = run("50000")
    assert full.returncode == 1
    message = full.stderr.splitlines()[-1]
    assert message.startswith(
        f"error: cannot write {output / 'all_kinds-train.array_record-00000-of-00001'}: "
    )
    assert message.endswith("File too large; the same command goes on from there")
    assert "Traceback" not in full.stderr
    enough = run()
    assert enough.returncode == 0
    assert enough.stdout.startswith(f"{output}: 300 of 300 samples of all_kinds")
    assert len(Stored(output)) == 300


def test_what_a_worker_cannot_write_is_told_in_a_line(tmp_path: Path) -> None:
    taken = tmp_path / "all_kinds-train.array_record-00001-of-00002"
    for directory in (taken, tmp_path / ".prepare"):
        directory.mkdir()
    with pytest.raises(
        PrepareError, match=f"^cannot write {taken}: Is a directory; the same command goes on"
    ):
        store(AllKinds(8), tmp_path, workers=2)


def test_a_killed_worker_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"was killed by signal 9; .*use fewer workers"):
        store(Suicidal(8), tmp_path / "out", workers=2)
    assert not list((tmp_path / "out" / ".prepare").glob("unfinished*"))


class Suicidal(AllKinds):
    def __getitem__(self, index: int) -> Record:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_the_command_prepares_a_source_of_the_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "images" / "1.jpg"
    image.parent.mkdir()
    image.write_bytes(encoded(1))
    annotations = tmp_path / "coco.json"
    box = {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 6, "width": 8}],
        "annotations": [box],
        "categories": [{"id": 3, "name": "cat"}],
    }
    annotations.write_text(json.dumps(content))
    output = tmp_path / "out"
    command = [
        "prepare",
        "--source",
        "coco",
        "--annotations",
        str(annotations),
        "--images",
        str(image.parent),
    ]
    command += ["--output", str(output), "--workers", "1"]
    assert commands.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 1 of 1 samples of coco, ")
    assert Stored(output)[0].turns[0].answer == "cat"
    assert commands.main(command) == 0
    assert "(finished before)" in capsys.readouterr().out

    content["categories"][0]["name"] = "dog"
    annotations.write_text(json.dumps(content))
    assert commands.main(command) == 2
    assert (
        "was written from something else: name a new directory (annotations: blake2b:"
        in capsys.readouterr().err
    )


def test_too_many_left_out_samples_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.catalog.open_source", lambda *_, **__: SomeBad(33))
    command = ["prepare", "--source", "x", "--output", str(tmp_path / "out"), "--workers", "1"]
    assert commands.main(command) == 1
    out, err = capsys.readouterr()
    assert "left out 11 (33.33%)" in out
    assert err.endswith("error: more than 5% of the samples were left out\n")
    assert commands.main([*command, "--max-left-out", "0.5"]) == 0


def test_one_image_has_one_key_in_all_prepared_directories(tmp_path: Path) -> None:
    class Renamed(AllKinds):
        name = "other"

        def __getitem__(self, index: int) -> Record:
            return super().__getitem__(7 - index)

    store(AllKinds(8), tmp_path / "a")
    store(Renamed(8), tmp_path / "b")
    ours, theirs = ([Stored(tmp_path / name).image_key(i) for i in range(8)] for name in "ab")
    seen = [index for index in range(8) if AllKinds(8)[index].image is not None]
    assert [ours[index] for index in seen] == [theirs[7 - index] for index in seen]
    # Those about no image share none.
    assert len({*ours, *theirs}) == len(ours) + len(theirs) - len(seen)


def test_a_stored_source_travels_to_another_process_as_its_name(prepared: Path) -> None:
    stored = Stored(prepared)
    data = pickle.dumps(stored)
    assert len(data) < 1000
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        records = list(threads.map(pickle.loads(data).__getitem__, list(range(10)) * 20))
    expected = [fields(stored[index]) for index in range(10)] * 20
    assert [fields(record) for record in records] == expected


@pytest.mark.parametrize("index", [-1, 10])
def test_there_is_no_record_beyond_the_last(prepared: Path, index: int) -> None:
    for read in (Stored(prepared).__getitem__, Stored(prepared).image_key):
        with pytest.raises(IndexError, match=f"no record {index} among the 10 of"):
            read(index)


def test_directories_that_are_not_prepared_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no directory .*absent"):
        Stored(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"was not written by `prepare`: it has no prepared\.json"):
        Stored(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in files(prepared).items():
        (copy / name).write_bytes(data)
    assert len(Stored(copy)) == 10
    shard = copy / "all_kinds-train.array_record-00002-of-00003"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"copy is damaged: all_kinds-train.array_record-00002-of-00003 has"):
        Stored(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=r"copy is incomplete: it has no all_kinds-train.array_record-00002"):
        Stored(copy)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(OSError, match=r"can't read record 9 of .*copy"):
        Stored(copy)[9]
    shard.write_bytes(whole)
    (copy / "image_keys.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"copy is damaged: can't read image_keys.npy"):
        Stored(copy)
    (copy / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match=r"copy is damaged: prepared.json is not valid json"):
        Stored(copy)
    (copy / "prepared.json").write_text('{"version": 2}')
    with pytest.raises(ValueError, match="copy has format 2, this program reads 1"):
        Stored(copy)
