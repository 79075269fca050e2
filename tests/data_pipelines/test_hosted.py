"""Data sets as TFDS hosts them: small ones, written by TFDS with the features of the real ones."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from pycocotools import mask as coco_mask
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.features.feature import TensorInfo
from tensorflow_datasets.core.naming import ShardedFileTemplate

from data_pipelines.sources.coco import Coco, RefCoco, RefCocoPlus
from data_pipelines.sources.hosted import HostedCoco, HostedLvis, HostedRefCoco

features = tfds.features
NUMBER = np.int64
SIZE = (6, 8)

BOX = {"id": NUMBER, "area": NUMBER, "bbox": features.BBoxFeature()}
COCO = {
    "image": features.Image(encoding_format="jpeg"),
    "image/filename": features.Text(),
    "image/id": NUMBER,
    "objects": features.Sequence(
        {**BOX, "label": features.ClassLabel(names=["person", "traffic light"]), "is_crowd": np.bool_}
    ),
}
LVIS_LABEL = features.ClassLabel(names=["aerosol_can", "arctic_(type_of_shoe)"])
LVIS = {
    "image": features.Image(encoding_format="jpeg"),
    "image/id": NUMBER,
    "neg_category_ids": features.Sequence(LVIS_LABEL),
    "not_exhaustive_category_ids": features.Sequence(LVIS_LABEL),
    "objects": features.Sequence(
        {**BOX, "label": LVIS_LABEL, "segmentation": features.Image(shape=(None, None, 1))}
    ),
}
REF_COCO = {
    "image": features.Image(encoding_format="jpeg"),
    "image/id": NUMBER,
    "objects": features.Sequence(
        {
            **BOX,
            "label": NUMBER,
            "gt_box_index": NUMBER,
            "mask": features.Image(encoding_format="png"),
            "refexp": features.Sequence({"refexp_id": NUMBER, "raw": features.Text()}),
        }
    ),
    "coco_annotations": features.Sequence({**BOX, "label": NUMBER}),
}


def encoded(pixels: np.ndarray, file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def picture(number: int) -> bytes:
    return encoded(np.full((*SIZE, 3), number, np.uint8), "JPEG")


def inside(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


def box(y0: float, x0: float, y1: float, x1: float) -> dict[str, Any]:
    """Corners in pixels, as shares of the image."""
    height, width = SIZE
    shares = features.BBox(ymin=y0 / height, xmin=x0 / width, ymax=y1 / height, xmax=x1 / width)
    return {"id": 1, "area": 1, "bbox": shares}


def prepare(data_dir: Path, name: str, fields: dict, examples: list[dict], split: str = "train") -> None:
    """Writes a data set into the folder where TFDS looks for it."""
    directory = data_dir / name / "1.1.0"
    directory.mkdir(parents=True)
    dataset = name.partition("/")[0]
    description = features.FeaturesDict(fields)
    serializer = ExampleSerializer(description.get_serialized_info())
    template = ShardedFileTemplate(
        data_dir=directory, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )
    writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
    for example in examples:
        writer.write(serializer.serialize_example(description.encode_example(example)))
    writer.close()
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=[len(examples)], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory, features=description, split_infos=[info], check_data=False
    )


def decoded(masks: tuple) -> np.ndarray:
    return np.stack([coco_mask.decode(dict(mask)) for mask in masks]).astype(bool)


@pytest.fixture
def coco_dir(tmp_path: Path) -> Path:
    objects = [
        {**box(1, 2, 4, 7), "label": 1, "is_crowd": False},
        # 0.4 to 2.6 has the centres of pixels 0 (0.5) to 2 (2.5).
        {**box(0.4, 0.6, 2.6, 2.4), "label": 0, "is_crowd": True},
        {**box(0, 0, 6, 8), "label": 0, "is_crowd": False},
    ]
    examples = [
        {"image": io.BytesIO(picture(9)), "image/filename": "9.jpg", "image/id": 9, "objects": objects},
        {"image": io.BytesIO(picture(7)), "image/filename": "7.jpg", "image/id": 7, "objects": []},
    ]
    prepare(tmp_path, "coco/2017", COCO, examples)
    return tmp_path


def test_coco_s_regions_are_its_boxes(coco_dir: Path) -> None:
    source = HostedCoco(coco_dir)
    assert (source.name, len(source), dict(source.dropped)) == ("tfds_coco", 2, {})
    record = source[0]
    assert (record.sample_id, record.image) == ("tfds_coco/9", picture(9))
    assert (record.opening, record.at_most, record.plain) == (Coco.opening, 20, False)
    assert [(turn.question, turn.answer, turn.regions) for turn in record.turns] == [
        ("<mask><pos>", "traffic light", (0,)),
        ("<mask><pos>", "person", (1,)),
        ("<mask><pos>", "person", (2,)),
    ]
    expected = [inside(slice(1, 4), slice(2, 7)), inside(slice(0, 3), slice(1, 2)), np.ones(SIZE, bool)]
    np.testing.assert_array_equal(decoded(record.masks), expected)
    assert "tensorflow" not in sys.modules


def test_an_image_without_objects_is_of_no_use(coco_dir: Path) -> None:
    with pytest.raises(ValueError, match="the image has no objects"):
        HostedCoco(coco_dir)[1]


def test_lvis_has_masks_and_names(tmp_path: Path) -> None:
    regions = [inside(slice(0, 2), slice(3, 8)), inside(slice(5, 6), slice(0, 1))]
    objects = [
        {**box(0, 0, 1, 1), "label": label, "segmentation": io.BytesIO(encoded(mask * np.uint8(255), "PNG"))}
        for label, mask in enumerate(regions)
    ]
    example = {
        "image": io.BytesIO(picture(3)),
        "image/id": 3,
        "neg_category_ids": [1],
        "not_exhaustive_category_ids": [],
        "objects": objects,
    }
    prepare(tmp_path, "lvis", LVIS, [example], split="minival")
    record = HostedLvis(tmp_path, split="minival")[0]
    assert [turn.answer for turn in record.turns] == ["aerosol can", "arctic (type of shoe)"]
    assert (record.opening, record.at_most) == (Coco.opening, 20)
    np.testing.assert_array_equal(decoded(record.masks), regions)


@pytest.mark.parametrize(
    ("config", "opening"), [("refcoco_unc", RefCoco.opening), ("refcocoplus_unc", RefCocoPlus.opening)]
)
def test_every_referring_expression_is_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, opening: str
) -> None:
    # TFDS's writer asks for the TensorFlow type of a list of lists, where NumPy's would do.
    monkeypatch.setattr(TensorInfo, "dtype", property(lambda info: info.np_dtype))
    regions = [inside(slice(1, 3), slice(2, 5)), inside(slice(4, 6), slice(0, 8))]
    said = [["left cup", "the one ö left"], ["table"]]
    objects = [
        {
            **box(0, 0, 1, 1),
            "label": 3,
            "gt_box_index": 0,
            "mask": io.BytesIO(encoded(mask, "PNG")),
            "refexp": [{"refexp_id": 1, "raw": text} for text in texts],
        }
        for mask, texts in zip(regions, said, strict=True)
    ]
    example = {
        "image": io.BytesIO(picture(5)),
        "image/id": 5,
        "objects": objects,
        "coco_annotations": [{**box(0, 0, 1, 1), "label": 3}],
    }
    prepare(tmp_path, f"ref_coco/{config}", REF_COCO, [example])
    source = HostedRefCoco(tmp_path, config=config)
    record = source[0]
    assert source.name == "tfds_ref_coco"
    assert [(turn.question, turn.answer, turn.regions) for turn in record.turns] == [
        ("<mask><pos>", "left cup", (0,)),
        ("<mask><pos>", "the one ö left", (0,)),
        ("<mask><pos>", "table", (1,)),
    ]
    assert (record.opening, record.at_most) == (opening, 15)
    np.testing.assert_array_equal(decoded(record.masks), regions)


def test_a_hosted_set_can_be_pickled(coco_dir: Path) -> None:
    source = HostedCoco(coco_dir)
    data = pickle.dumps(source)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert [turn.answer for turn in again[0].turns] == ["traffic light", "person", "person"]
    assert again.image_key(0) == source.image_key(0) != source.image_key(1)


def test_a_set_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no data set lvis that TFDS prepared in {tmp_path}"):
        HostedLvis(tmp_path)


def test_an_unknown_split_is_told(coco_dir: Path) -> None:
    with pytest.raises(ValueError, match="validation"):
        HostedCoco(coco_dir, split="validation")


def test_files_of_another_format_are_told(coco_dir: Path) -> None:
    info = coco_dir / "coco" / "2017" / "1.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="prepare it with file_format=array_record"):
        HostedCoco(coco_dir)


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_record_beyond_the_last(coco_dir: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"no record {index} among 2 of coco/2017"):
        HostedCoco(coco_dir)[index]
