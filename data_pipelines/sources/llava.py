"""LLaVA's files: captions of whole images, and conversations about an image or about none."""

from typing import Any

from data_pipelines.records import Record, Turn
from data_pipelines.sources.files import SampleSource, field
from osprey_jax.prompt import IMAGE_TOKEN

_OPENING = f"{IMAGE_TOKEN}\n"


class _Llava(SampleSource):
    def _image_name(self, sample: Any) -> str:
        return field(sample, "image", str)


class LlavaPretrain(_Llava):
    """Image and caption, for the alignment of the projector."""

    name = "llava_pretrain"

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        messages = field(sample, "conversations", list)
        if len(messages) != 2:
            raise ValueError(f"expected a request and its caption, got {len(messages)} messages")
        image = self._images.read(self._image_name(sample))
        turn = Turn("", field(messages[1], "value", str))
        return Record(sample_id, image, (), (turn,), opening=_OPENING, plain=True)


class LlavaInstruct(_Llava):
    """Conversations in which human and model take turns."""

    name = "llava_instruct"

    def _image_name(self, sample: Any) -> str:
        return super()._image_name(sample) if not isinstance(sample, dict) or "image" in sample else ""

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        turns = _turns(field(sample, "conversations", list))
        name = self._image_name(sample)
        if name:
            # The image comes first wherever the first question has it.
            question, answer = turns[0]
            if IMAGE_TOKEN not in question:
                raise ValueError(f"the first question doesn't name its image: {question[:80]!r}")
            turns[0] = question.replace(IMAGE_TOKEN, "").strip(), answer
        if any(IMAGE_TOKEN in text for turn in turns for text in turn):
            raise ValueError(
                f"{IMAGE_TOKEN} stands in other places than a question that begins with an image"
            )
        return Record(
            sample_id=sample_id,
            image=self._images.read(name) if name else None,
            masks=(),
            turns=tuple(Turn(question, answer) for question, answer in turns),
            opening=_OPENING if name else "",
        )


def _turns(messages: list) -> list[tuple[str, str]]:
    texts = [(field(message, "from", str), field(message, "value", str)) for message in messages]
    if texts and texts[0][0] != "human":
        texts = texts[1:]
    speakers = [speaker for speaker, _ in texts]
    if speakers != [("human", "gpt")[place % 2] for place in range(len(texts))]:
        raise ValueError(f"human and gpt don't take turns: {', '.join(speakers[:8])}")
    if len(texts) < 2:
        raise ValueError("no question has an answer")
    return [(texts[at][1], texts[at + 1][1]) for at in range(0, len(texts) - 1, 2)]
