"""The page of samples: all of it in one file, the words escaped, the masks where they belong."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from osprey_jax.label import gallery
from osprey_jax.label.outlines import places, shrink, svg_path
from tests.label import data_files
from tests.label.conftest import Run, contents, lines
from tests.label.data_files import HEIGHT, NAMES, WIDTH
from tests.label.stand_in import StandIn


class Page(HTMLParser):
    """Attributes of all tags of a kind, and what is said in list entries."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: dict[str, list[dict[str, str]]] = {}
        self.entries: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        if tag == "li":
            self.entries.append("")

    def handle_data(self, data: str) -> None:
        if self.entries:
            self.entries[-1] += data


def rasterised(path: str, size: tuple[int, int]) -> np.ndarray:
    """`(h, w)` bool of a path of straight lines by the even-odd rule, at pixels' centres."""
    inside = np.zeros(size, bool)
    fine = 8
    for outline in re.findall("M([^z]*)z", path):
        points = [tuple(float(v) * fine for v in point.split(",")) for point in outline.split()]
        canvas = Image.new("1", (size[1] * fine, size[0] * fine))
        ImageDraw.Draw(canvas).polygon(points, fill=1)
        inside ^= np.asarray(canvas)[fine // 2 :: fine, fine // 2 :: fine]
    return inside


def test_the_page_shows_images_regions_and_words(folder: Path, run: Run) -> None:
    assert run("--gallery", "--shards", 3) == 0
    text = Path("out/gallery.html").read_text(encoding="utf-8")
    page = Page(text)
    images = [tag["src"] for tag in page.tags["img"]]
    assert len(images) == len(NAMES)
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in images]
    pixels = {np.asarray(image.convert("RGB")).tobytes() for image in shown}
    assert pixels == {data_files.picture(index).tobytes() for index in range(len(NAMES))}
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|https?:', text)
    said = [line["text"] for line in lines("out")]
    assert len(page.entries) == len(said)
    for entry, line in zip(page.entries, lines("out"), strict=True):
        assert line["text"] in entry
        assert line["label"] in entry
    assert "&lt;pixels&gt;" in text
    assert "Please give me a short description of &lt;region&gt;" in text


def test_a_gallery_of_a_finished_job_may_stand_elsewhere_and_miss_images(folder: Path, run: Run) -> None:
    assert run() == 0
    before = contents("out")
    (folder / "images" / NAMES[0]).unlink()
    assert run("--gallery", "page.html") == 0
    page = Page(Path("page.html").read_text())
    assert len(page.tags["img"]) == len(NAMES) - 1
    assert contents("out") == before


def test_a_text_that_looks_like_a_place_of_the_page_stays_as_it_is(run: Run) -> None:
    assert run("--gallery", "--question", "Is {{cards}} {{facts}} <region>?") == 0
    text = Path("out/gallery.html").read_text(encoding="utf-8")
    assert "<dd>Is {{cards}} {{facts}} &lt;region&gt;?</dd>" in text
    assert text.count("<article>") == len(NAMES)


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("nowhere/page.html", "nowhere/page.html: No such file or directory"),
        ("out/nowhere/page.html", "out/nowhere/page.html: No such file or directory"),
        ("coco.json/page.html", "coco.json/page.html: Not a directory"),
        ("images", "images: it is a directory"),
    ],
)
def test_a_page_that_cant_be_written_is_refused_before_the_work(
    page: str, told: str, run: Run, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--gallery", page) == 2
    assert f"cannot write the gallery {Path.cwd()}/{told}" in capsys.readouterr().err
    assert stand_in.loads == []
    assert not Path("out").exists()


@pytest.mark.parametrize("page", ["page.html", "out/page.html"])
def test_a_page_appears_when_the_work_is_done(page: str, run: Run, stand_in: StandIn) -> None:
    stand_in.interrupted_at = 2
    assert run("--gallery", page) == 130
    assert not Path(page).exists()
    assert run("--gallery", page) == 0
    assert Path(page).exists()


def test_paths_go_around_masks_and_their_holes() -> None:
    y, x = np.mgrid[:120, :160]
    ring = (np.hypot(x - 70, y - 60) < 45) & (np.hypot(x - 80, y - 60) > 20)
    parts = ring | ((x > 130) & (y < 30)) | ((x < 9) & (y > 100))
    for mask in (ring, parts):
        path = svg_path(mask)
        found = rasterised(path, mask.shape)
        assert (found & mask).sum() / (found | mask).sum() > 0.98
        assert path.count(",") < 120
    assert svg_path(np.zeros((5, 5), bool)) == ""


def test_a_single_pixel_and_a_checkerboard_have_closed_paths() -> None:
    one = np.zeros((9, 9), bool)
    one[4, 5] = True
    assert svg_path(one).count("M") == 1
    board = (np.indices((6, 6)).sum(0) % 2).astype(bool)
    assert len(re.findall("M[^z]+z", svg_path(board))) > 1


def test_a_thin_mask_does_not_vanish_when_it_is_shrunk() -> None:
    line = np.zeros((1000, 1000), bool)
    line[500] = True
    assert shrink(line, (100, 100)).sum() == 100


def test_numbers_lie_inside_of_their_masks_and_apart() -> None:
    masks = np.zeros((4, 60, 80), bool)
    masks[0, 5:55, 5:75] = True
    masks[1, 20:40, 30:50] = True
    masks[2, 25:30, 35:45] = True
    points = places(list(masks), apart=6)
    assert points[3] is None
    for mask, point in zip(masks[:3], points[:3], strict=True):
        assert mask[int(point[1]), int(point[0])]
    found = np.array(points[:3])
    distance = np.linalg.norm(found[:, None] - found, axis=-1) + 100 * np.eye(3)
    assert distance.min() >= 6


@pytest.mark.parametrize("read_whole", [0, 1 << 20])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_a_sample_has_whole_images_of_all_files(
    count: int, read_whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "READ_WHOLE", read_whole)
    written = []
    for number, images in enumerate(([3, 1, 2], [], [4], [1] * 20)):
        rows = [
            {"image": f"{number}/{image}", "line": line}
            for image, regions in enumerate(images)
            for line in range(regions)
        ]
        path = tmp_path / f"labels-{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written += rows
    found = list(gallery.sample(sorted(tmp_path.glob("*.jsonl")), count))
    for lines_ in found:
        assert lines_ == [row for row in written if row["image"] == lines_[0]["image"]]
    images = [lines_[0]["image"] for lines_ in found]
    assert len(set(images)) == len(images)
    if read_whole:
        assert len(images) == min(count, 24)
    else:
        assert 1 <= len(images) <= min(count, 24)
    if count == 100:
        assert {image[0] for image in images} == {"0", "2", "3"}


def test_the_overlay_is_at_the_images_place(folder: Path, run: Run) -> None:
    """Paths are in the coordinates of an image that is enlarged to 640 pixels."""
    assert run("--gallery") == 0
    text = Path("out/gallery.html").read_text(encoding="utf-8")
    boxes = re.findall('<svg viewBox="([^"]+)"', text)
    assert set(boxes) == {f"0 0 640 {640 * HEIGHT // WIDTH}"}
    first = re.search('<path data-n="1"[^>]* d="([^"]+)"', text)
    assert first is not None
    [[_, mask]] = data_files.masks(0).items()
    scale = 640 // WIDTH
    large = mask.repeat(scale, 0).repeat(scale, 1)
    found = rasterised(first[1], large.shape)
    assert (found & large).sum() / (found | large).sum() > 0.95
