"""The benchmark that kills the command."""

import json
from pathlib import Path

import pytest

from benchmarks.label_kills import write_data


@pytest.mark.parametrize("regions", [1, 2, 9])
def test_each_image_has_so_many_regions_whatever_its_objects_are(regions: int, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    write_data(directory, 4, regions, 64, 0)
    written = [json.loads(line) for line in (directory / "regions.jsonl").read_text().splitlines()]
    assert [len(line["annotations"]) for line in written] == [regions] * 4
