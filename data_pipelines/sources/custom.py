"""A user's own data: a JSONL file.

UTF-8, one object a line; this one is shown on several to be read::

    {"image": "kitchen/0001.jpg",
     "regions": [{"polygon": [[12, 8, 90.5, 8, 90.5, 60]]},
                 {"rle": {"size": [480, 640], "counts": "…"}},
                 {"png": "masks/0001_cup.png"},
                 {"box": [30, 40, 130, 90]}],
     "conversations": [{"from": "human", "value": "What is <region1>?"},
                       {"from": "gpt", "value": "A kettle."},
                       {"from": "human", "value": "Is <region3> left of <region1>?"},
                       {"from": "gpt", "value": "Yes, the cup stands left of it."}],
     "id": "0001-a"}

`image`: the name of a file, relative to the images' folder, which is the JSONL's own unless another is given,
and inside of it. Any format that Pillow reads. Pixels count as they are stored: an EXIF orientation is not
applied.

`regions`: a list, empty for a conversation about the whole picture. Each is an object with exactly one of

* `polygon`: a list of polygons `[x0, y0, x1, y1, …]` of at least three points, or a single one, in pixels and
  rasterised as COCO does.
* `rle`: COCO's run lengths of the image's `size` [height, width], `counts` a list or a string.
* `png`: the name, as the image's, of a PNG of the image's size; what isn't 0 is inside. It has one channel,
  or several that are all the same; of a palette the indices count.
* `box`: `[x0, y0, x1, y1]` in pixels, the upper left and the lower right corner. Pixels whose centre lies
  inside (x0 <= column + 0.5 < x1) belong to it, so with whole numbers it is `mask[y0:y1, x0:x1]`.

What lies outside of the image is cut off. A region without a pixel is left out of training where one question
alone names it, which names no other: with that question and its answer. Any other stays, and is empty.

`conversations`: objects with `from`, which is `human` and `gpt` in turn, and `value`, a text. `<regionN>` in
a question stands for region N, counted from 1: there the model sees it. One may be named several times. In
an answer `<regionN>` becomes the word `regionN`; the model sees no numbers, so that answers should rather say
what is meant than `regionN`, unless regions are listed.

`list_regions`, which may be missing: with true, all regions are listed by their numbers before the first
question, as `Osprey.chat` and the Osprey-724K conversations do it. `<regionN>` becomes the word `regionN` in
questions too; regions that no text names are seen as well. Of ::

    {"image": "kitchen/0001.jpg", "list_regions": true,
     "regions": [{"box": [30, 40, 130, 90]}, {"box": [140, 40, 190, 90]}],
     "conversations": [{"from": "human", "value": "Which is a cup?"},
                       {"from": "gpt", "value": "<region2> is, right of <region1>."}]}

the answer is `region2 is, right of region1.` and the question, on one line behind the introduction ::

    Ther are 2 part regions in the picture: region1<mask><pos>,region2<mask><pos>. Which is a cup?

The tokenizer's own `<image>`, `<mask>`, `<pos>`, `<s>`,
`</s>` and `<unk>` can't be written. The image's place and what introduces it are put before the first
question.

`id`, which may be missing: a text or a whole number that names the sample in messages, beside its line.

Other keys are allowed and mean nothing. Blank lines are skipped. `python -m data_pipelines validate FILE`
tells what is wrong with a file.
"""

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.records import Record
from data_pipelines.sources.custom_rules import BadSample, make_record, parse_line, read_lines, why_no_jsonl
from data_pipelines.sources.files import Element, FileSource, OtherFormError


class Custom(FileSource):
    """The conversations of a JSONL file.

    Args:
      annotations: the file.
      images: what the names of images and masks are relative to, as in `open_images`; by default the file's
        folder.

    Lines that hold no JSON object, or one that `parse_line` refuses, have no index. Raises ValueError for a
    file that is JSON as a whole, a list or an object on many lines.
    """

    name = "custom"

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str] | None = None):
        self._numbers = array("q")
        super().__init__(annotations, images_of(annotations, images))

    def __getitem__(self, index: int) -> Record:
        """Raises ValueError with everything that is wrong with a sample, after the number of its line."""
        (line,) = self._read(index)
        return self._record(f"{self._path.name}:{self._numbers[index]}", parse_line(line))

    def _find(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        first = next(read_lines(io.BytesIO(data)), None)
        if first is not None and (reason := why_no_jsonl(self._path, first.text)) is not None:
            raise OtherFormError(reason)
        for number, start, text in read_lines(io.BytesIO(data)):
            try:
                entry = parse_line(text)
            except BadSample:
                self._dropped["a line that is no JSON object"] += 1
                continue
            self._numbers.append(number)
            name = entry.get("image")
            yield name if isinstance(name, str) else "", (Element(entry, start, start + len(text)),)

    def _record(self, sample_id: str, *values: Any) -> Record:
        try:
            return make_record(values[0], self._images, sample_id)
        except BadSample as error:
            raise ValueError(f"{sample_id}: {error}") from error


def images_of(annotations: str | os.PathLike[str], images: str | os.PathLike[str] | None) -> Path:
    """What the names in a file are relative to."""
    return Path(annotations).parent if images is None else Path(images)
