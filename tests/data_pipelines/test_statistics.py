"""What `stats` counts against numbers worked out by hand."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import histograms, sample_sizes, statistics_report
from data_pipelines.__main__ import main
from data_pipelines.records import Record, Turn
from osprey_jax.masks import encode_rle
from osprey_jax.prompt import SYSTEM_TRAINING, Tokenizer

IMAGE = 1024
SYSTEM = 1 + len(SYSTEM_TRAINING.split())
"""With its BOS; each of its words is one token of the tests' vocabulary."""


@dataclasses.dataclass
class Cards:
    """A source of the records that it is given; an error in one's place is raised."""

    records: list[Record | Exception]
    name: str = "cards"
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        found = self.records[index]
        if isinstance(found, Exception):
            raise found
        return found

    def image_key(self, index: int) -> str:
        return f"{index}"


def card(*regions: int, words: int = 1) -> Record:
    """A turn for each region, of 10 of 100 pixels or, number 1, of none; its answer has so many words."""
    mask = np.zeros((10, 10), bool)
    mask[3] = True
    return Record(
        sample_id="card",
        image=b"no image at all",
        masks=(encode_rle(mask), encode_rle(mask & False)),
        turns=tuple(Turn("<mask><pos>", " ".join(["red"] * words), (region,)) for region in regions),
        opening="<image>\n",
    )


def length(turns: int, words: int) -> int:
    """USER: and ASSISTANT:, two tokens of the region, the answer and its </s>."""
    return SYSTEM + IMAGE + turns * (5 + words)


def measure(*records: Record | Exception, tokenizer: Tokenizer, **options: object) -> sample_sizes.Found:
    options = {"samples": 100, **options}
    return sample_sizes.measure([Cards(list(records))], tokenizer, **options)


def test_lengths_have_the_image_and_areas_are_shares(tokenizer: Tokenizer) -> None:
    found = measure(card(0, words=2), card(0, 0), card(0, 1), tokenizer=tokenizer)
    # The empty mask of the last one is left out with its turn.
    assert found.lengths == [length(1, 2), length(2, 1), length(1, 1)]
    assert found.with_loss == [3, 4, 2]
    assert found.regions == [1, 2, 1]
    assert found.areas == [0.1] * 4
    assert found.dropped_regions == 1


def test_skipped_samples_are_counted_by_what_is_wrong(tokenizer: Tokenizer) -> None:
    faults = [ValueError(f"region {n}: a polygon of {n} points in 'a{n}.json'") for n in (1, 22)]
    others = [FileNotFoundError("no image /data/1.jpg"), KeyError("segm")]
    found = measure(card(0), *faults, *others, card(1), tokenizer=tokenizer)
    (tally,) = found.tallies
    assert (tally.size, tally.drawn, len(found.lengths)) == (6, 6, 1)
    assert tally.skipped == {
        "region N: a polygon of N points in …": 2,
        "no image …": 1,
        "KeyError: …": 1,
        "every mask is empty": 1,
    }
    told = "\n".join(statistics_report.source_lines(found.tallies))
    assert "6 samples; 6 looked at, 1 kept, 5 skipped" in told
    assert "cards[1]: region 1: a polygon of 1 points in 'a1.json'" in told


def test_a_sample_takes_the_smallest_bucket_that_holds_it(tokenizer: Tokenizer) -> None:
    small, large = (length(2, 1), 2), (length(3, 1) + 4, 4)
    records = card(0), card(0, 0), card(0, 0, 0), card(0, words=30), card(*[0] * 5)
    found = measure(*records, tokenizer=tokenizer, largest=large)
    uses, too_large = sample_sizes.use_of(found, (small, large))
    assert [(use.bucket, use.samples) for use in uses] == [(small, 2), (large, 1)]
    # Of the first two one is as large as the bucket, the other lacks a turn of 6 tokens and a region.
    assert uses[0].padding == pytest.approx((6 / (2 * small[0]), 1 / 4))
    assert uses[1].padding == pytest.approx((4 / large[0], 1 / 4))
    places = 2 * small[0] + large[0]
    assert sample_sizes.padding(uses) == pytest.approx((10 / places, 2 / 8))
    # The long answer fits nowhere, the five regions do when their turns are parted.
    assert (too_large, found.unfit) == (2, 1)
    told = statistics_report.to_text(found, (small, large), width=80, blocks=False)
    assert "2 samples (40.0%) don't fit the largest: they are split by turns, but of 1 no turn fits" in told


def test_draws_are_the_same_for_a_seed_and_never_twice(tokenizer: Tokenizer) -> None:
    records = [card(0, words=words) for words in range(1, 41)]
    runs = [measure(*records, tokenizer=tokenizer, samples=15, seed=seed).lengths for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 15
    assert len(set(measure(*records, tokenizer=tokenizer, samples=999).lengths)) == 40


def test_sources_count_by_their_sizes(tokenizer: Tokenizer) -> None:
    sources = [Cards([card(0)] * 30, "few"), Cards([card(0, 0)] * 300, "many")]
    found = sample_sizes.measure(sources, tokenizer, samples=110)
    few, many = found.tallies
    assert (few.name, few.size, many.name, many.size) == ("few", 30, "many", 300)
    assert few.drawn + many.drawn == 110
    assert 3 <= few.drawn <= 20
    assert Counter(found.regions) == {1: few.drawn, 2: many.drawn}


@pytest.mark.parametrize("values", [[5], [3, 3, 9], [1060, 2047, 1100], list(range(0, 5000, 7)), [0, 10**9]])
def test_bins_of_integers_hold_what_their_names_say(values: list[int]) -> None:
    made = histograms.of_integers(values, title="", axis="")
    for name, count in zip(made.names, made.counts, strict=True):
        low, _, high = name.replace(",", "").partition("–")
        assert count == sum(int(low) <= value <= int(high or low) for value in values)
    assert sum(made.counts) == len(values)
    assert len(made.counts) <= histograms.MAX_BINS
    assert min(made.counts[0], made.counts[-1]) > 0


def test_bins_of_shares_are_about_evenly_apart_on_a_log_scale() -> None:
    made = histograms.of_shares([1.0, 0.5, 0.02, 0.0199, 0.003], title="", axis="")
    assert made.names == (
        "0.2–0.5 %", "0.5–1 %", "1–2 %", "2–5 %", "5–10 %", "10–20 %", "20–50 %", "50–100 %"
    )  # fmt: skip
    assert made.counts == (1, 0, 1, 1, 0, 0, 0, 2)
    assert histograms.of_shares([1e-12], title="", axis="").counts == (1,)
    assert histograms.of_shares([], title="", axis="").counts == (0,)


def test_bars_are_as_long_as_their_counts() -> None:
    made = histograms.of_integers([1] * 40 + [2] * 10 + [4], title="Regions", axis="named")
    title, *lines = histograms.to_text(made, width=70, blocks=False).splitlines()
    assert title == "Regions (named)"
    assert [re.sub("#+", "", line).split() for line in lines] == [
        ["1", "40", "78.4%"], ["2", "10", "19.6%"], ["3", "0", "0.0%"], ["4", "1", "2.0%"]
    ]  # fmt: skip
    bars = [line.count("#") for line in lines]
    assert bars[0] > 40
    assert bars[1] == pytest.approx(bars[0] / 4, abs=1)
    assert bars[2] == 0 < bars[3]
    blocks = histograms.to_text(made, width=70, blocks=True).splitlines()
    assert [line.count("█") for line in blocks[1:3]] == [bars[0], bars[0] // 4]


def test_drawn_bars_are_as_high_as_their_counts_and_limits_are_marked() -> None:
    made = histograms.of_integers([1] * 30 + [2] * 10, title="Regions", axis="named")

    def count(picture: Image.Image, colour: tuple[int, ...]) -> np.ndarray:
        return (np.asarray(picture) == colour).all(axis=-1).sum(axis=0)

    plain = histograms.draw([made], marks=[[]], heading="40 samples")
    heights = count(plain, histograms.BAR)
    middle = (histograms.LEFT + histograms.PANEL[0] - histograms.RIGHT) // 2
    first, second = heights[middle - 50], heights[middle + 50]
    assert first == pytest.approx(3 * second, abs=4)
    assert second > 50
    assert count(plain, histograms.MARK).sum() == 0
    marked = histograms.draw([made], marks=[[(1.0, "1"), (9.0, "9")]], heading="40 samples")
    # A limit of one region parts those of one from those of two; one beyond all is not drawn.
    assert np.flatnonzero(count(marked, histograms.MARK) > 100) == pytest.approx([middle, middle], abs=2)


@pytest.mark.parametrize(
    ("text", "buckets"),
    [("64x2", ((64, 2),)), ("2048x32, 1408x16", ((1408, 16), (2048, 32))), ("8x0,8x0,9x0", ((8, 0), (9, 0)))],
)
def test_buckets_come_smallest_first(text: str, buckets: tuple[tuple[int, int], ...]) -> None:
    assert sample_sizes.parse_buckets(text) == buckets


@pytest.mark.parametrize("text", ["", "64", "64x2,", "0x2", "-1x2", "64x2x3", "64x2;65x2", "64x4,128x2", "a"])
def test_other_buckets_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--source", "shapes", f"--buckets={text}"]) == 2
    assert re.fullmatch(r"error: .*buckets.*\n", capsys.readouterr().err)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """`coco.json` and `images`: two pictures of one and of two regions, neither of which can be decoded."""
    (tmp_path / "images").mkdir()
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 10, "width": 20} for n in (1, 2)]
    for image in images:
        (tmp_path / "images" / image["file_name"]).write_bytes(b"not looked at")
    box = [[2, 2, 6, 2, 6, 7, 2, 7]]
    annotations = [{"image_id": n, "category_id": 0, "segmentation": box} for n in (1, 2, 2)]
    told = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "dog"}]}
    (tmp_path / "coco.json").write_text(json.dumps(told))
    return tmp_path


def test_the_command_reads_several_sources_and_decodes_no_image(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--annotations={coco}/coco.json", f"--images={coco}/images"]
    given = ["--source=coco", *files, *files, "--source=coco"]
    assert main(["stats", *given, "--buckets=2000x1,2000x2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tallies = [(source["name"], source["size"], source["kept"]) for source in told["sources"]]
    assert tallies == [("coco", 2, 2)] * 2
    assert (told["regions"]["edges"], told["regions"]["counts"]) == ([1, 2, 3], [2, 2])
    assert told["regions"]["mean"] == 1.5
    assert told["mask_area"]["median"] == 20 / 200
    assert [bucket["samples"] for bucket in told["buckets"]] == [2, 2]
    assert told["too_large"] == {"samples": 0, "without_a_turn_that_fits": 0}


def test_the_command_tells_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.png"
    options = ["--samples", "20", "--buckets", "1150x4,1300x7", "--figure", str(path)]
    assert main(["stats", "--source", "shapes", *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("shapes: 1,000,000 samples; 20 looked at, 20 kept, 0 skipped\n")
    for told in ("Sequence length", "Regions of a sample", "Mask area", "bucket", "1150x4", "together"):
        assert f"\n{told}" in out
    assert f"figure in {path}\n" in err
    assert "tokens are those of shapes' small tokenizer; --tokenizer DIR for yours\n" in err
    with Image.open(path) as picture:
        assert picture.size[0] > 1500


def test_nothing_to_count_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jsonl").write_text('{"image": "none.jpg", "regions": [], "conversations": []}\n')
    assert main(["stats", "--source", "custom", "--annotations", f"{tmp_path}/mine.jsonl", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 looked at, 0 kept, 1 skipped" in err
    assert err.endswith("error: none of the samples can be used\n")
