"""What is written: once, whole, and the same wherever the job is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from osprey_jax.label import command, output
from osprey_jax.label.output import Output, Part
from osprey_jax.label.plan import make_plan
from osprey_jax.label.setting import differences
from osprey_jax.label.storage import Bucket
from tests.label import data_files
from tests.label.conftest import Run, contents, lines
from tests.label.data_files import NAMES
from tests.label.stand_in import ROOT, StandIn

ARGUMENTS = ["--checkpoint", "checkpoint", "--images", "images", "--masks", "coco.json", "--output", "out"]


def start(folder: Path, *options: str, delay: float) -> subprocess.Popen:
    environment = {**os.environ, "DELAY": str(delay), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "tests.label.stand_in", *ARGUMENTS, *options]
    return subprocess.Popen(line, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def many_images(count: int) -> None:
    """A larger data set: the images again and again, under other names."""
    images, annotations = [], []
    for number in range(count):
        name = f"{number:03d}.png"
        (Path("images") / name).write_bytes((Path("images") / NAMES[number % 7]).read_bytes())
        images.append({"id": number, "file_name": name})
        annotations += [
            {"id": 10 * number + place, "image_id": number, "segmentation": data_files.rle(mask)}
            for place, mask in enumerate(data_files.masks(number % 7).values())
        ]
    Path("coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def test_killed_at_random_places_the_files_become_those_of_an_undisturbed_run(folder: Path, run: Run) -> None:
    many_images(60)
    assert run("--shards", 3, output="whole") == 0
    expected = contents("whole")
    size = sum(len(data) for name, data in expected.items() if name.startswith("labels"))
    rng = random.Random(0)
    for share in (0.1, 0.4, 0.75):
        process = start(folder, "--shards", "3", delay=0.05)
        while sum(path.stat().st_size for path in Path("out").glob("labels-*")) < share * size:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert contents("out") != expected
    assert run("--shards", 3) == 0
    assert contents("out") == expected
    identities = [(line["image"], line["region"]) for line in lines("out")]
    assert len(set(identities)) == len(identities) == sum(len(data_files.masks(n % 7)) for n in range(60))


def test_two_processes_cant_write_the_same_shards(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(60)
    process = start(folder, delay=0.5)
    try:
        while not list(Path("out").glob("labels-*")):
            assert process.poll() is None
            time.sleep(0.01)
        assert run() == 2
    finally:
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
    assert "another process is writing out/labels-00000-of-00001.jsonl" in capsys.readouterr().err
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in told
    assert run() == 0
    assert len({line["image"] for line in lines("out")}) == 60


@pytest.mark.parametrize("lost", [0, 1])
def test_what_is_behind_the_noted_bytes_is_written_anew(lost: int, folder: Path, run: Run) -> None:
    """A line that a power cut tore, and a unit whose note was not written any more."""
    assert run() == 0
    expected = contents("out")
    note = json.loads(expected[".label/00000.json"])
    first = expected["labels-00000-of-00001.jsonl"].splitlines(keepends=True)
    units = 3 - lost
    kept = b"".join(first[: sum(len(data_files.masks(index)) for index in range(2 * units))])
    note |= {
        "units": units,
        "bytes": len(kept),
        "images": 2 * units,
        "described": 2 * units,
        "regions": kept.count(b"\n"),
    }
    Path("out/.label/00000.json").write_text(json.dumps(note))
    torn = b"".join(first)[: len(kept) + 100 + 400 * lost]
    Path("out/labels-00000-of-00001.jsonl").write_bytes(torn)
    Path("out/skipped-00000-of-00001.jsonl").write_bytes(b'{"image": "x", "rea')
    assert run() == 0
    assert contents("out") == expected


def test_a_file_that_lost_what_was_noted_is_refused(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    path = Path("out/labels-00000-of-00001.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    assert run() == 2
    assert "labels-00000-of-00001.jsonl is damaged" in capsys.readouterr().err


def test_a_finished_job_needs_no_model(run: Run, stand_in: StandIn) -> None:
    assert run("--dtype", "bfloat16", "--quantize", "int8") == 0
    before = contents("out")
    assert run("--dtype", "bfloat16", "--quantize", "int8") == 0
    assert stand_in.loads == [("checkpoint", "bfloat16", "int8")]
    assert contents("out") == before


def change_masks() -> None:
    data = json.loads(Path("coco.json").read_text())
    data["annotations"].pop()
    Path("coco.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("options", "change", "told"),
    [
        (["--question", "What is <region>?"], None, "prompt.text: "),
        (["--max-new-tokens", "3"], None, "prompt.max_new_tokens: 64 then, 3 now"),
        (["--stop", "."], None, 'prompt.stop: [] then, ["."] now'),
        (["--shards", "3"], None, "shards: 2 then, 3 now"),
        ([], lambda: Path("checkpoint/config.json").write_text("{ }"), "model: "),
        ([], change_masks, "regions: "),
    ],
)
def test_a_run_of_another_setting_is_refused_with_what_differs(
    options, change, told: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--shards", 2) == 0
    before = contents("out")
    if change is not None:
        change()
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert "error: out was begun with another setting" in error.replace(f"{Path.cwd()}/", "")
    assert told in error
    assert contents("out") == before


def test_where_two_questions_part_is_shown() -> None:
    then, now = (
        {"text": f"A chat. {'It is long. ' * 20}What is {end}"} for end in ("a <mask>?", "b <mask>?")
    )
    [told] = differences({"prompt": then}, {"prompt": now})
    before = "… is long. It is long. What is "
    assert told == f'  prompt.text: {before}a <mask>?" then, {before}b <mask>?" now'
    [told] = differences({"prompt": {}}, {"prompt": then})
    assert told.startswith('  prompt.text: null then, "A chat. It is long.')
    assert told.endswith("… now")


def test_the_setting_can_be_read_by_whoever_can_read_the_words(run: Run) -> None:
    assert run() == 0
    modes = {path.stat().st_mode for path in Path("out").iterdir() if path.is_file()}
    assert len(modes) == 1
    assert {path.name for path in Path("out/.label").iterdir()} == {"lock", "00000.json"}


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("images", "holds other things, such as"),
        ("coco.json", "coco.json is not a directory"),
        ("coco.json/out", "coco.json/out is not a directory"),
    ],
)
def test_an_output_that_is_none_is_refused(
    where: str,
    told: str,
    options: list[str],
    run: Run,
    stand_in: StandIn,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*options, output=where) == 2
    assert told in capsys.readouterr().err
    assert stand_in.loads == []


def test_an_output_that_cant_be_made_is_refused_before_a_model_is_loaded(
    run: Run,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as it is for users other than root
    assert run(output="some/where") == 2
    assert f"cannot write {Path.cwd()}/some/where" in capsys.readouterr().err
    assert stand_in.loads == []


def test_lines_tell_the_models_and_the_prompts_versions(folder: Path, run: Run) -> None:
    assert run() == 0
    assert run("--seed", 4, output="seed") == 0
    shutil.copytree("checkpoint", "copy")
    assert run("--checkpoint", "copy", output="copied") == 0
    Path("checkpoint/config.json").write_text('{"mask_token_id": 7}')
    assert run(output="other") == 0
    first, seed, copied, other = (lines(name)[0] for name in ("out", "seed", "copied", "other"))
    assert list(first) == [
        *("image", "region", "label", "box", "area", "segmentation", "question", "text"),
        *("logprob", "logprobs", "model", "prompt"),
    ]
    assert first["question"] == "Please give me a short description of <region>. Using a short phrase."
    assert first["logprobs"] == [round(-first["area"] / 7, 5), -0.33333]
    assert first["logprob"] == round(-first["area"] / 7 - 1 / 3, 5)
    assert copied == first
    assert (seed["model"], seed["prompt"]) == (first["model"], seed["prompt"])
    assert seed["prompt"] != first["prompt"] == other["prompt"]
    assert other["model"] != first["model"]


def test_hosts_write_different_shards_and_together_everything(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(23)
    assert run("--shards", 5, output="alone") == 0
    expected = contents("alone")
    seen: set[str] = set()
    for host in range(2):
        assert run("--shards", 5, "--host", f"{host}/2") == 0
        now = {name for name in contents("out") if name.startswith("labels")}
        assert len(now - seen) == 3 - host
        seen |= now
    assert contents("out") == expected
    assert run("--host", "2/2") == 2
    assert "--host is I/N" in capsys.readouterr().err
    assert run("--shards", 5, "--host", "0/6", output="few") == 2
    assert "give --shards 6 or more" in capsys.readouterr().err


def test_a_job_in_which_nothing_works_stops_early_and_leaves_nothing(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(40)
    (folder / "wrong").mkdir()
    options = ["--images", "wrong", "--masks", "coco.json"]
    assert run(*options, "--give-up-after", 10, masks=None) == 2
    told = capsys.readouterr().err
    assert "10 images failed one after another" in told
    assert "000.png: no image 000.png in wrong" in told
    assert run(*options, masks=None) == 2
    assert "not one image can be used; the first of them: 000.png: no image" in capsys.readouterr().err
    assert {path.name for path in Path("out").iterdir()} == {".label"}
    assert run() == 0


def test_many_failures_in_the_middle_are_tried_again_or_allowed(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(40)
    shutil.copytree("images", "kept")
    for number in range(10, 25):
        Path(f"images/{number:03d}.png").unlink()
    assert run("--give-up-after", 9) == 2
    assert "9 images failed one after another" in capsys.readouterr().err
    assert lines("out", "skipped") == []
    assert {line["image"] for line in lines("out")} == {f"{number:03d}.png" for number in range(10)}
    shutil.copytree("out", "mended")
    assert run("--give-up-after", 16) == 0
    assert [line["image"] for line in lines("out", "skipped")] == [f"{n:03d}.png" for n in range(10, 25)]
    assert run("--images", "kept", "--masks", "coco.json", masks=None, output="mended") == 0
    assert run("--images", "kept", "--masks", "coco.json", masks=None, output="whole") == 0
    names = [name for name in contents("whole") if name != output.RUN]
    assert {name: contents("mended")[name] for name in names} == {
        name: contents("whole")[name] for name in names
    }


def test_a_full_disk_ends_the_job_with_its_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    write = os.write
    monkeypatch.setattr(os, "write", full)
    assert run() == 2
    told = capsys.readouterr().err
    assert "labels-00000-of-00001.jsonl: No space left on device; the same command goes on" in told
    monkeypatch.undo()


def test_a_dry_run_estimates_from_a_sample_and_writes_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(70)
    before = contents(".")
    assert run("--dry-run", "--host", "0/2") == 0
    told = capsys.readouterr().out
    regions = sum(len(data_files.masks(number % 7)) for number in range(70))
    assert "of 8 images" in told
    assert f"about {regions} regions of 70 images" in told
    assert "on each of 2 hosts" in told
    assert contents(".") == before
    whole = float(told.split("output: about ")[1].split(" MB")[0])
    assert run() == 0
    assert whole == pytest.approx(
        sum(path.stat().st_size for path in Path("out").glob("*-*")) / 1e6, abs=0.051
    )


def test_a_dry_run_estimates_what_is_left(
    run: Run, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--shards", 2, "--host", "1/2") == 0
    before = contents("out")
    left = len({line["image"] for line in lines("out")})
    regions = len(lines("out"))
    assert run("--dry-run") == 0
    total = sum(len(data_files.masks(index)) for index in range(7))
    told = capsys.readouterr().out
    assert f"left: about {total - regions} regions of {7 - left} of the 7 images" in told
    assert run("--host", "0/1") == 0
    whole, loads = contents("out"), len(stand_in.loads)
    assert run("--dry-run") == 0
    assert capsys.readouterr().out == "nothing is left to do\n"
    assert (contents("out"), len(stand_in.loads)) == (whole, loads)
    assert before.items() - whole.items() == set()


def test_a_dry_run_for_an_output_of_another_setting_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    assert run("--dry-run", "--seed", 1) == 2
    assert "prompt.seed: 0 then, 1 now" in capsys.readouterr().err


def test_progress_goes_on_where_it_was(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--shards", 2, "--host", "0/1") == 0
    told = capsys.readouterr().err
    total = sum(len(data_files.masks(index)) for index in range(7))
    assert f"{total}/{total}" in told
    assert "regions/s" in told
    assert "7 images" in told
    shutil.rmtree("out/.label")
    (Path("out") / ".label").mkdir()
    assert run() == 0


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (None, [0, 2, 4, 5]),
        ([1, 1, 1, 1, 1], [0, 2, 4, 5]),
        ([600, 600, 10, 5000, 3], [0, 1, 3, 4, 5]),
    ],
)
def test_units_are_bounded_in_images_and_regions(counts, expected, stand_in: StandIn) -> None:
    plan = make_plan(5, None if counts is None else np.array(counts), 3)
    assert plan.starts.tolist() == expected
    units = [unit for shard in range(3) for unit in plan.units(shard)]
    assert [image for unit in units for image in plan.images(unit)] == list(range(5))


def test_a_bucket_gets_the_files_that_a_disk_gets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit is an object until its shard is complete; so it is after a kill between object and note."""
    parts = [Part(b"line %d\n" % n, b"skip\n" * (n % 2), 1, 1, 1, n % 2, 0) for n in range(5)]

    def add(to: str, shards: dict[int, int], *units: tuple[int, int]) -> None:
        with Output(to, {"setting": {"x": 1}}, shards, 2) as out:
            for shard, unit in units:
                out.add(shard, unit, parts[3 * shard + unit])

    shards = {0: 3, 1: 2}
    everything = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    add("disk", shards, *everything)
    monkeypatch.setattr(output, "open_storage", lambda path, *, hidden: Bucket(Path(path), hidden))
    add("bucket", shards, *everything[:1])
    (Path("bucket/.label/parts") / f"labels-00000-of-00002.jsonl-{7:015d}-{11:015d}").write_bytes(b"torn")
    add("bucket", shards, *everything[1:])
    names = {name for name in contents("disk") if "labels" in name or "skipped" in name}
    assert len(names) == 4
    assert {name: contents("bucket")[name] for name in names} == {
        name: contents("disk")[name] for name in names
    }
    assert contents("bucket")["labels-00000-of-00002.jsonl"] == b"line 0\nline 1\nline 2\n"
    assert list(Path("bucket/.label/parts").iterdir()) == []
    # A kill while what was joined is removed.
    (Path("bucket/.label/parts") / f"labels-00000-of-00002.jsonl-{14:015d}-{21:015d}").write_bytes(
        b"line 2\n"
    )
    add("bucket", shards)
    assert contents("bucket")["labels-00000-of-00002.jsonl"] == b"line 0\nline 1\nline 2\n"


def test_help_shows_an_example_and_the_forms_of_masks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for part in ("python -m osprey_jax.label --checkpoint", "COCO json", "panoptic", "--data", "--host 0/4"):
        assert part in shown
