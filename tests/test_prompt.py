"""Prompts: ids and labels against transformers 4.31 (golden/make_golden.py), strings against literals."""

import importlib.resources
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from osprey_jax import prompt
from osprey_jax.prompt import Dialogue, Tokenizer

GOLDEN = Path(__file__).with_name("golden")
CASES = json.loads((GOLDEN / "golden.json").read_text())
SMALL = GOLDEN / "small.model"
MODELS = {
    "small": SMALL,
    "mistral": Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1")),
}
TRAINING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
INFERENCE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def directory_of(model: Path, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.copyfile(model, directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.load(directory_of(model, root / name)) for name, model in MODELS.items()}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def with_labels(case: dict) -> tuple[list[int], list[int]]:
    labelled = set(case["labelled"])
    return case["ids"], [token if place in labelled else -100 for place, token in enumerate(case["ids"])]


def test_prompts_have_the_ids_of_transformers_4_31(loaded: dict[str, Tokenizer], name: str) -> None:
    wrong = [c["text"] for c in CASES["prompts"] if prompt.tokenize(loaded[name], c["text"]) != c[name]]
    assert wrong == []


def test_encode_gives_the_ids_without_bos(loaded: dict[str, Tokenizer], name: str) -> None:
    cases = [c for c in CASES["prompts"] if "<image>" not in c["text"]]
    assert [c["text"] for c in cases if loaded[name].encode(c["text"]) != c[name][1:]] == []


def test_answers_have_the_text_of_transformers_4_31(loaded: dict[str, Tokenizer], name: str) -> None:
    cases = [c for c in CASES["decode"] if c["model"] == name]
    assert [c for c in cases if loaded[name].decode(c["ids"]) != c["text"]] == []


def test_dialogues_are_labelled_where_transformers_4_31_has_their_answers(
    loaded: dict[str, Tokenizer], name: str
) -> None:
    cases = [c for c in CASES["dialogues"] if c["model"] == name]
    dialogues = [prompt.encode_dialogue(loaded[name], [tuple(turn) for turn in c["turns"]]) for c in cases]
    assert [c["turns"] for c, d in zip(cases, dialogues, strict=True) if d != with_labels(c)] == []


def test_captions_are_labelled_to_their_newline(loaded: dict[str, Tokenizer], name: str) -> None:
    cases = [c for c in CASES["captions"] if c["model"] == name]
    captions = [prompt.encode_caption(loaded[name], c["caption"]) for c in cases]
    assert [c["caption"] for c, d in zip(cases, captions, strict=True) if d != with_labels(c)] == []


def test_ids_of_special_tokens(loaded: dict[str, Tokenizer], name: str) -> None:
    found, size = loaded[name], {"small": 400, "mistral": 32000}[name]
    assert (found.pad_id, found.bos_id, found.eos_id) == (0, 1, 2)
    assert (found.mask_id, found.position_id) == (size, size + 1)


def labelled_pieces(dialogue: Dialogue, model: Path) -> list[str | int]:
    """The tokens that carry loss, as pieces; those a model doesn't have stay ids."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pairs = zip(dialogue.input_ids, dialogue.labels, strict=True)
    assert all(label in (token, -100) for token, label in pairs)
    found = [label for label in dialogue.labels if label != -100]
    return [pieces.id_to_piece(label) if 0 <= label < len(pieces) else label for label in found]


@pytest.mark.parametrize(
    ("answer", "labelled"),
    [
        ("dog", ["▁dog"]),
        ("5", ["▁", "5"]),
        ("猫", ["▁", "猫"]),
        ("狗", ["▁", "<0xE7>", "<0x8B>", "<0x97>"]),
        ("12 dogs", ["▁", "1", "2", "▁dogs"]),
        ("", ["▁"]),
        ("dog <mask><pos>.", ["▁dog", "▁", "▁."]),
        ("<mask><pos> 5", ["▁", "▁▁", "5"]),
    ],
)
def test_loss_is_on_the_answer_from_behind_the_colon_to_its_end(
    loaded: dict[str, Tokenizer], answer: str, labelled: list[str]
) -> None:
    turns = [("<image>\nWhat is <mask><pos>?", answer), ("What?", answer)]
    dialogue = prompt.encode_dialogue(loaded["mistral"], turns)
    assert labelled_pieces(dialogue, MODELS["mistral"]) == [*labelled, "</s>"] * 2
    assert (dialogue.input_ids[0], dialogue.input_ids.count(-200)) == (1, 1)


def test_a_caption_carries_loss_with_its_newline_and_has_no_end(loaded: dict[str, Tokenizer]) -> None:
    dialogue = prompt.encode_caption(loaded["mistral"], "a dog")
    assert labelled_pieces(dialogue, MODELS["mistral"]) == ["▁a", "▁dog", "<0x0A>"]
    assert (dialogue.input_ids[:2], dialogue.labels[:2]) == ([1, -200], [-100, -100])


def test_the_system_text_of_a_dialogue_can_be_another(loaded: dict[str, Tokenizer]) -> None:
    dialogue = prompt.encode_dialogue(loaded["mistral"], [("What?", "dog")], system="Hear.")
    assert dialogue.input_ids == prompt.tokenize(loaded["mistral"], "Hear. USER: What? ASSISTANT: dog</s>")
    assert labelled_pieces(dialogue, MODELS["mistral"]) == ["▁dog", "</s>"]


def test_placeholders_and_special_ids() -> None:
    assert (prompt.IMAGE_TOKEN, prompt.MASK_TOKEN, prompt.POSITION_TOKEN) == ("<image>", "<mask>", "<pos>")
    assert (prompt.REGION, prompt.IMAGE_TOKEN_ID, prompt.IGNORE_LABEL) == ("<mask><pos>", -200, -100)


def test_system_texts_are_the_originals() -> None:
    assert (prompt.SYSTEM_TRAINING, prompt.SYSTEM_INFERENCE) == (TRAINING, INFERENCE)


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([("Hi", None)], "S. USER: Hi ASSISTANT:"),
        ([("Hi", "Ho")], "S. USER: Hi ASSISTANT: Ho</s>"),
        ([("Hi", "Ho"), ("a\nb?", None)], "S. USER: Hi ASSISTANT: Ho</s>USER: a\nb? ASSISTANT:"),
        ([("1", "2"), ("3", "4")], "S. USER: 1 ASSISTANT: 2</s>USER: 3 ASSISTANT: 4</s>"),
        ([("1", "")], "S. USER: 1 ASSISTANT: </s>"),
    ],
)
def test_conversation_is_vicunas_template(turns: list[tuple[str, str | None]], text: str) -> None:
    assert prompt.conversation(turns, system="S.") == text


@pytest.mark.parametrize(
    ("question", "normal"),
    [
        ("<image>.\nThis provides", "<image>\n.\nThis provides"),
        ("<image>\n\nThis provides", "<image>\nThis provides"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        (" What is it? \n<image>", "<image>\nWhat is it?"),
        ("What <image> is it?", "<image>\nWhat  is it?"),
        (" no picture ", " no picture "),
    ],
)
def test_the_image_of_a_question_goes_first(question: str, normal: str) -> None:
    assert prompt.normalize_image(question) == normal


def test_region_lists_keep_the_spelling_of_the_data() -> None:
    assert prompt.region_list(1) == "Ther are 1 part region in the picture: region1<mask><pos>. "
    assert prompt.region_list(3) == (
        "Ther are 3 part regions in the picture: region1<mask><pos>,region2<mask><pos>,region3<mask><pos>. "
    )


ASKED = {
    "demo_short": "<image>\n\nThis provides an overview of the picture.\n"
    "Please give me a short description of <mask><pos>. Using a short phrase.",
    "demo_detailed": "<image>\n\nThis provides an overview of the picture.\n"
    "Can you give me a detailed description of <mask><pos>?",
    "lvis_paco": "<image>\nThis provides an overview of the picture.\n"
    "What is the category of <mask><pos>? Using only one word or phrase.",
    "panoptic": "<image>\n.\nThis provides an overview of the picture.\n"
    "What is in <mask><pos>? Using a short phrase.",
    "refcocog": "<image>\n.\nThis provides an overview of the picture.\n"
    "Please give me a short description of <mask><pos>.",
}
OPENINGS = {
    "ferret_bench": "<image>\n.\nThis provides an overview of the picture.\n",
    "detailed_description": "<image>\n.\nThis provides an overview of the picture.\n",
    "pope": "<image>\n",
}


@pytest.mark.parametrize("protocol", ASKED)
def test_protocols_ask_the_originals_questions(protocol: str) -> None:
    found = prompt.PROTOCOLS[protocol]
    assert found.question is not None
    assert found.opening + found.question == ASKED[protocol]
    assert found.prompt() == f"{INFERENCE} USER: {ASKED[protocol]} ASSISTANT:"


@pytest.mark.parametrize("protocol", OPENINGS)
def test_benchmarks_ask_their_own_question_behind_the_originals_opening(protocol: str) -> None:
    found = prompt.PROTOCOLS[protocol]
    assert (found.opening, found.question) == (OPENINGS[protocol], None)
    assert found.prompt("Why?") == f"{INFERENCE} USER: {OPENINGS[protocol]}Why? ASSISTANT:"


def test_there_are_no_other_protocols() -> None:
    assert set(prompt.PROTOCOLS) == {*ASKED, *OPENINGS}


WHOLE = "Region: a Dog, red. It: runs. It: runs."
DEMO = [
    ("a dog", "a dog."),
    ("a dog.", "a dog."),
    ("a dog. It runs. It runs. It eats.", "a dog. It runs."),
    ("a dog. It runs. a dog. It eats.", "a dog. It runs. a dog. It eats."),
    ("region1: a dog. a dog. a cat.", "a dog."),
    ("region1: a dog: brown. big", "a dog."),
    ("one... two", "one. two."),
    ("3.5 metres", "3.5 metres."),
    ("...", ""),
    ("", ""),
]
KEPT = [
    *(("demo_short", text, kept) for text, kept in DEMO),
    *(("demo_detailed", text, kept) for text, kept in DEMO),
    ("lvis_paco", "traffic light", "traffic light"),
    ("lvis_paco", "Region: traffic light, red.", " traffic light  red "),
    ("lvis_paco", "a:b,c.d:e", "b c d"),
    ("refcocog", "a man. in red.", "a man.\n in red.\n"),
    ("refcocog", "region1: a man: tall.", " a man"),
    ("refcocog", "region1: a man. tall", " a man.\n tall"),
    ("detailed_description", WHOLE, " a Dog, red. It"),
    ("detailed_description", "a Dog. a Dog.", "a Dog. a Dog."),
    ("panoptic", WHOLE, WHOLE),
    ("ferret_bench", WHOLE, WHOLE),
    ("pope", "Yes: It IS.", "yes: it is."),
]


@pytest.mark.parametrize(("protocol", "text", "kept"), KEPT)
def test_protocols_keep_of_an_answer_what_the_original_keeps(protocol: str, text: str, kept: str) -> None:
    assert prompt.PROTOCOLS[protocol].keep(text) == kept


def trained_tokenizer(*special: str) -> tokenizers.Tokenizer:
    """A BPE over characters, as the tokenizers package writes it to `tokenizer.json`."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=list(special), show_progress=False)
    backend.train_from_iterator(["the dog and the cat saw the red dog"], trainer)
    return backend


def test_saved_sentencepiece_models_are_the_same_files(
    loaded: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    loaded[name].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert (tmp_path / "tokenizer.model").read_bytes() == MODELS[name].read_bytes()
    text = CASES["prompts"][0]["text"]
    assert prompt.tokenize(Tokenizer.load(tmp_path), text) == CASES["prompts"][0][name]


def test_a_tokenizer_json_gives_its_own_ids_and_is_saved_as_it_was(tmp_path: Path) -> None:
    backend = trained_tokenizer("<unk>", "<s>", "</s>")
    data = backend.to_str(pretty=True).encode()
    (tmp_path / "tokenizer.json").write_bytes(data)
    found = Tokenizer.load(str(tmp_path))
    size = backend.get_vocab_size()
    assert (found.pad_id, found.bos_id, found.eos_id) == (0, 1, 2)
    assert (found.mask_id, found.position_id) == (size, size + 1)
    dog, cat = (backend.encode(text, add_special_tokens=False).ids for text in ("the dog", "red cat"))
    assert found.encode("the dog<mask><pos>red cat</s>") == [*dog, size, size + 1, *cat, 2]
    assert prompt.tokenize(found, "the dog<image>red cat") == [1, *dog, -200, *cat]
    assert found.decode([1, *dog, size, 2]) == "the dog"
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == data


def test_placeholders_that_a_tokenizer_json_has_keep_their_ids(tmp_path: Path) -> None:
    trained_tokenizer("<unk>", "<s>", "</s>", "<pos>", "<mask>").save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    assert (found.position_id, found.mask_id) == (3, 4)
    assert found.encode("<mask><pos>") == [4, 3]


def test_a_tokenizer_model_goes_before_a_tokenizer_json(tmp_path: Path) -> None:
    trained_tokenizer("<unk>", "<s>", "</s>").save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(directory_of(SMALL, tmp_path)).mask_id == 400


def unigram_model() -> bytes:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog and the cat", "saw the red dog"]),
        model_writer=writer,
        model_type="unigram",
        vocab_size=17,
        minloglevel=2,
    )
    return writer.getvalue()


BROKEN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty model": ("tokenizer.model", bytes, "cannot read"),
    "no SentencePiece model": (
        "tokenizer.model",
        lambda: b"version https://a.file.elsewhere\n",
        "cannot read",
    ),
    "truncated model": ("tokenizer.model", lambda: SMALL.read_bytes()[:2000], "cannot read"),
    "another kind of model": ("tokenizer.model", unigram_model, "another kind than BPE"),
    "empty json": ("tokenizer.json", bytes, "cannot read"),
    "json of something else": ("tokenizer.json", lambda: b'{"a": 1}', "cannot read"),
    "json without BOS": (
        "tokenizer.json",
        lambda: trained_tokenizer("<unk>", "</s>").to_str().encode(),
        "lacks the special token <s>",
    ),
    "json without EOS": (
        "tokenizer.json",
        lambda: trained_tokenizer("<unk>", "<s>").to_str().encode(),
        "lacks the special token </s>",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_tokenizer_is_an_error_that_names_its_file(fault: str, tmp_path: Path) -> None:
    file, make, reason = BROKEN[fault]
    (tmp_path / file).write_bytes(make())
    with pytest.raises(ValueError, match=reason) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / file) in str(error.value)


def test_no_tokenizer_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.model nor tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)
