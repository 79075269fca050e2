"""`validate` finds every fault of a file at once, and only faults."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import validation
from data_pipelines.__main__ import main
from data_pipelines.images import Images
from data_pipelines.validation import Report, validate
from tests.data_pipelines.custom_files import CUT_OFF, encoded, picture, sample, write_images, write_lines

BOX = {"box": [0, 0, 2, 2]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path)
    return tmp_path


def checked(folder: Path, *lines: dict | str | bytes) -> Report:
    return validate(write_lines(folder / "data.jsonl", lines))


def told(report: Report) -> list[tuple[int, str, str]]:
    return [(finding.line, finding.level, finding.kind) for finding in report.findings]


def test_good_file_has_nothing_to_tell(folder):
    report = checked(
        folder,
        sample(),
        "",
        sample(image="cmyk.jpg", regions=[{"png": "mask.png"}]),
        sample(
            "<region1>?",
            "Yes.",
            "And <region2>?",
            "No.",
            image="deep.png",
            regions=[{"box": [0, 0, 1, 1]}] * 2,
        ),
    )
    assert report == Report(lines=3, regions=4, turns=4)
    assert (report.samples, report.bad_lines) == (3, [])


def test_every_bad_line_is_told_at_once_with_all_that_is_wrong_with_it(folder):
    report = checked(
        folder,
        "{,",
        sample(),
        sample("<region2>", "<s>", image="cut.jpg", regions=[{"box": [1, 1, 1, 1]}]),
        b"\xff",
        "",
        sample(image="gone.jpg", regions=[{"png": "gone.png"}, 3]),
    )
    assert told(report) == [
        (1, "error", "JSON"),
        (3, "error", "region"),
        (3, "error", "placeholder"),
        (3, "error", "special token"),
        (3, "error", "image"),
        (4, "error", "text"),
        (6, "error", "missing file"),
        (6, "error", "region"),
    ]
    assert (report.lines, report.samples, report.bad_lines) == (5, 1, [1, 3, 4, 6])
    assert (report.regions, report.turns) == (1, 1)


def test_truncated_image_is_found_though_its_header_is_whole(folder):
    (finding,) = checked(folder, sample(image="cut.jpg")).findings
    assert finding[:3] == (1, "error", "image")
    assert finding.text.startswith("cut.jpg is damaged: ")
    assert "truncated" in finding.text


def test_truncated_mask_is_found(folder):
    whole = (folder / "mask.png").read_bytes()
    (folder / "mask.png").write_bytes(whole[: whole.index(b"IDAT") + 8])
    (finding,) = checked(folder, sample(regions=[{"png": "mask.png"}])).findings
    assert finding[:3] == (1, "error", "region")


def test_empty_masks_are_a_doubt_until_no_turn_is_left(folder):
    both = [CUT_OFF, BOX]
    report = checked(
        folder,
        sample("<region1> <region2>", "x", regions=both),
        sample(regions=[CUT_OFF]),
        sample(regions=both),
    )
    assert told(report) == [
        (1, "warning", "empty mask"),
        (2, "warning", "empty mask"),
        (2, "error", "region"),
        (3, "warning", "empty mask"),
        (3, "warning", "unnamed region"),
        (3, "error", "region"),
    ]


def test_region_that_no_question_names_is_a_doubt(folder):
    report = checked(folder, sample("What is <region1>?", "This.", regions=[BOX, BOX]))
    assert told(report) == [(1, "warning", "unnamed region")]
    assert "region 2" in report.findings[0].text


@pytest.mark.parametrize(
    ("texts", "training"),
    [
        (["<region1>?", "x", "<region2>?", "y"], "training leaves it out with its question and the answer;"),
        (["<region1> <region2>?", "x"], "training keeps it, as an empty region;"),
        (["<region1>?", "x", "<region1>?", "y", "<region2>?", "z"], "training keeps it, as an empty region;"),
        (["<region1>, <region1>?", "x", "<region2>?", "z"], "training keeps it, as an empty region;"),
    ],
)
def test_doubt_about_an_empty_mask_says_what_training_does(folder, texts, training):
    (finding,) = checked(folder, sample(*texts, regions=[CUT_OFF, BOX])).findings
    assert finding.kind == "empty mask"
    assert training in finding.text


def test_listed_regions_are_all_seen_and_numbered(folder):
    texts = ("Which?", "<region2>, not region1.")
    assert checked(folder, sample(*texts, regions=[BOX, BOX], list_regions=True)) == Report(1, 2, 1)


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        (
            ["<region1>?", "region2", "<region2>?", "x"],
            "message 2: the answer says region2, which no question",
        ),
        (
            ["<region2>?", "<region2>", "<region1>?", "x"],
            "message 2: the answer says region2, which is number 1",
        ),
        (["<region1>, <region2>?", "region3"], "message 2: the answer says region3, which no question"),
    ],
)
def test_numbers_in_answers_that_the_model_can_not_count_are_a_doubt(folder, texts, what):
    (finding,) = checked(folder, sample(*texts, regions=[BOX, BOX])).findings
    assert finding[:3] == (1, "warning", "region number")
    assert finding.text.startswith(what)
    assert "list_regions" in finding.text


def test_numbers_in_answers_that_are_places_are_no_fault(folder):
    texts = ("<region1>, <region1>?", "region1", "<region2>?", "region2, region1s, a subregion9")
    assert checked(folder, sample(*texts, regions=[BOX, BOX])).findings == []


@pytest.mark.parametrize(
    "region",
    [
        {"box": [0.1, 0.1, 0.9, 0.9]},
        {"polygon": [0, 0, 1, 0, 1, 1]},
        {"polygon": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]] * 2},
    ],
)
def test_shares_of_the_sides_instead_of_pixels_are_a_doubt(folder, region):
    report = checked(folder, sample("<region1> <region2>?", "x", regions=[BOX, region]))
    (finding,) = (finding for finding in report.findings if finding.kind == "coordinates")
    assert finding.level == "warning"
    assert finding.text.startswith("region 2: ")
    assert "coordinates are in pixels" in finding.text


@pytest.mark.parametrize("text", ["[\n {},\n {}\n]", '[{"image": 1}]', "\ufeff\n{\n}"])
def test_json_that_is_no_jsonl_is_one_error(folder, text):
    path = folder / "data.json"
    path.write_text(text, encoding="utf-8")
    (finding,) = validate(path).findings
    assert finding[:3] == (0, "error", "JSON")
    assert finding.text.startswith(f"{path} is JSON and not JSONL, ")


def test_exif_orientation_is_noted_and_not_applied(folder):
    # The picture is wider than high; turned, its masks would be of another size.
    report = checked(folder, sample(image="turned.jpg", regions=[{"png": "mask.png"}]))
    assert told(report) == [(1, "note", "EXIF orientation")]
    assert report.samples == 1


def test_broken_exif_hinders_nobody(folder):
    for name, exif in (("no_tiff.jpg", b"Exif\0\0garbage"), ("cut.jpg", b"Exif\0\0MM\0*\0\0\0\x08\0\x09")):
        (folder / name).write_bytes(encoded(picture(), exif=exif))
        assert checked(folder, sample(image=name)).findings == []


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_file_without_samples_is_bad(folder, data):
    (folder / "data.jsonl").write_bytes(data)
    report = validate(folder / "data.jsonl")
    assert told(report) == [(0, "error", "empty file")]
    assert report.samples == 0


def test_byte_order_mark_and_windows_line_ends_are_no_fault(folder):
    path = write_lines(folder / "data.jsonl", [sample(), sample()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert validate(path) == Report(lines=2, regions=2, turns=2)


def test_last_line_needs_no_end(folder):
    path = write_lines(folder / "data.jsonl", [sample(), "{"])
    path.write_bytes(path.read_bytes()[:-1])
    assert validate(path).bad_lines == [2]


def test_images_may_be_elsewhere(folder, tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("elsewhere") / "data.jsonl", [sample()])
    assert validate(path).bad_lines == [1]
    assert validate(path, images=folder).bad_lines == []


def test_processes_tell_the_same_in_the_same_order(folder, monkeypatch):
    monkeypatch.setattr(validation, "CHUNK", 3)
    lines = [sample() if number % 4 else sample(image="gone.jpg") for number in range(20)]
    path = write_lines(folder / "data.jsonl", ["", *lines])
    alone, together = validate(path), validate(path, workers=2)
    assert (alone.lines, alone.bad_lines) == (20, [2, 6, 10, 14, 18])
    assert together == alone


def test_dead_process_is_told(folder):
    def kill(part: Report) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    path = write_lines(folder / "data.jsonl", [sample()] * 10_000)
    with pytest.raises(OSError, match=r"a process that checked line \d+ or a later one has died"):
        validate(path, workers=2, tell=kill)
    assert multiprocessing.active_children() == []


def test_what_a_process_can_not_read_is_told(folder):
    def remove(part: Report) -> None:
        path.unlink(missing_ok=True)

    path = write_lines(folder / "data.jsonl", [sample()] * 10_000)
    with pytest.raises(FileNotFoundError, match=r"data\.jsonl"):
        validate(path, workers=2, tell=remove)
    assert multiprocessing.active_children() == []


def test_command_tells_each_fault_and_a_summary(folder, capsys):
    path = write_lines(
        folder / "data.jsonl",
        [sample(), sample("<region1>?", "x\x1b[31m</s>"), sample(image="turned.jpg"), sample(regions=[])],
    )
    assert main(["validate", str(path), "--workers", "1"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "line 2: error: message 2: </s> is in the text; it can't be written, leave it out",
        "line 4: error: message 1: <region1> is named, there are 0 regions",
        "note: 1 image has an EXIF orientation, which is not applied: regions belong to the pixels as they "
        "are stored (line 3)",
        f"{path}: 4 lines, 2 can be used, 2 can't; 2 regions and 2 turns in what can be used",
        "errors: 1 special token, 1 placeholder",
    ]


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_end_all_processes_and_tell_what_was_found(folder, times):
    path = write_lines(folder / "data.jsonl", ["x", *[sample()] * 20_000])
    command = [sys.executable, "-m", "data_pipelines", "validate", str(path), "--workers", "2"]
    # As from a terminal: all processes get the signal.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("line 1: error: not JSON")
            for _ in range(times):
                os.killpg(process.pid, signal.SIGINT)
            # Whose end comes only when nobody holds them.
            out, err = process.communicate(timeout=20)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if times == 1:
        assert process.returncode == 130
        assert out.startswith(f"{path}, not to its end: ")
        assert "errors: 1 JSON" in out
        assert err.splitlines()[-1] == "interrupted"
        assert "Traceback" not in err
    else:  # which may come when Python is about to end
        assert process.returncode in (130, -signal.SIGINT)


def test_command_tells_findings_before_the_end(folder, monkeypatch, capsys):
    monkeypatch.setattr(validation, "CHUNK", 1)

    def stop(path: Path, images: Images, chunk: validation._Chunk) -> Report:
        if chunk.number == 3:
            raise KeyboardInterrupt
        return check(path, images, chunk)

    check = validation._check_chunk
    monkeypatch.setattr(validation, "_check_chunk", stop)
    path = write_lines(folder / "data.jsonl", [sample(), "x", sample()])
    assert main(["validate", str(path), "--workers", "1"]) == 130
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "line 2: error: not JSON at character 1: Expecting value; write one object a line",
        f"{path}, not to its end: 2 lines, 1 can be used, 1 can't; 1 regions and 1 turns in what can be used",
        "errors: 1 JSON",
    ]
    assert said.err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("workers", ["0", "-1", "1.5", "x"])
def test_command_wants_a_worker(folder, capsys, workers):
    with pytest.raises(SystemExit, match="2"):
        main(["validate", str(folder / "data.jsonl"), f"--workers={workers}"])
    assert f"{workers} is no whole number above 0" in capsys.readouterr().err


def test_command_ends_with_0_where_there_are_only_doubts(folder, capsys):
    path = write_lines(folder / "data.jsonl", [sample("What?", "This.")])
    assert main(["validate", str(path), "--workers", "1"]) == 0
    assert "warnings: 1 unnamed region" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["none.jsonl"], ["."], ["data.jsonl", "--images", "none"]])
def test_command_ends_with_2_where_there_is_nothing_to_check(folder, capsys, monkeypatch, arguments):
    monkeypatch.chdir(folder)
    write_lines(folder / "data.jsonl", [sample()])
    assert main(["validate", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.out == ""


def test_unprintable_names_stay_on_one_line(folder, capsys):
    path = write_lines(folder / "data.jsonl", [sample(image="a\n\x1b[2Jb.jpg")])
    assert main(["validate", str(path), "--workers", "1"]) == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("line 1: error: no image a \\x1b[2Jb.jpg in ")


def test_long_files_show_rate_and_time_left(folder, monkeypatch, capsys):
    shown = validation.tqdm
    monkeypatch.setattr(
        validation, "tqdm", lambda **options: shown(**{**options, "delay": 0, "mininterval": 0})
    )
    checked(folder, *[sample()] * 3)
    assert "3/3" in (told := capsys.readouterr().err)
    assert "lines/s" in told


@pytest.mark.parametrize("most", [16, 47])  # beyond the double Pillow raises, below it only warns
def test_image_of_too_many_pixels_is_told(folder, monkeypatch, most):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    report = checked(folder, sample())
    assert told(report) == [(1, "error", "image")]
    assert f"more than {most} pixels" in report.findings[0].text
