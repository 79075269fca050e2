"""Makes `small.model` and `golden.json`: what the Llama tokenizer of transformers 4.31 answers.

Runs in an environment of its own, for what it asks is what later versions of transformers answer differently:

    python3.11 -m venv golden-venv
    golden-venv/bin/pip install transformers==4.31.0 sentencepiece 'protobuf<4' 'numpy<2'
    golden-venv/bin/python tests/golden/make_golden.py .../mistral_common/data/tokenizer.model.v1

The argument is a file of the package mistral-common: a model of 32,000 pieces, of which those of white space
share one score. In the small model the first merge makes `▁▁`, whose score is 0.
Labels are found by the character offsets of the tokens. The same files come out of every run.
"""

import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import transformers

HERE = Path(__file__).parent
IMAGE, IMAGE_ID = "<image>", -200
REGION = "<mask><pos>"

TRAINING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
INFERENCE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)

# Indented, so that `▁▁` is the most frequent pair; the rest gives words, a few of them of the prompts.
CORPUS = """
    the boat on the left is red and the boat on the right is blue
        a child with an umbrella waits at the station in the rain
            what is the colour of the roof? it is green, said the man
        USER: what is in the region? ASSISTANT: a dog on the grass
    USER: and in this region? ASSISTANT: part of a bicycle wheel
        please describe the picture: the street is wet, the sky is grey.
                for window in house.windows: window.open(at=7)
            while light > 0: light = light - 1
        the region in the middle shows the hand of the child
    short description of the region: 3 white birds, 12 black birds
            一只狗在草地上 一只猫在树上 狗和猫
        naïve façade, the caf\u00e9 at the corner of the street
""".strip("\n").splitlines()

OVERVIEW = "This provides an overview of the picture.\n"
PROTOCOL_QUESTIONS = [
    f"<image>\n\n{OVERVIEW}Please give me a short description of {REGION}. Using a short phrase.",
    f"<image>\n\n{OVERVIEW}Can you give me a detailed description of {REGION}?",
    f"<image>\n{OVERVIEW}What is the category of {REGION}? Using only one word or phrase.",
    f"<image>\n.\n{OVERVIEW}What is in {REGION}? Using a short phrase.",
    f"<image>\n.\n{OVERVIEW}Please give me a short description of {REGION}.",
    f"<image>\n.\n{OVERVIEW}What is the object in {REGION} doing with {REGION}?",
    "<image>\nIs there a dog in the image?",
    f"<image>\n{OVERVIEW}Ther are 1 part region in the picture: region1{REGION}. What is it?",
    f"<image>\n{OVERVIEW}Ther are 2 part regions in the picture: region1{REGION},region2{REGION}. "
    "What is the relation of region1 and region2?",
    REGION,
    f"<image>.\n{OVERVIEW}Name {REGION}.",
]

CHATS = [
    f"{TRAINING} USER: <image>\n{OVERVIEW}{REGION} ASSISTANT: dog</s>USER: {REGION} ASSISTANT: 3 cats</s>"
    f"USER: {REGION} ASSISTANT: 狗</s>",
    f"{TRAINING} USER: What now? ASSISTANT: Nothing.</s>USER: And then? ASSISTANT:",
    f"{INFERENCE} USER: <image>\nHello ASSISTANT: Hi</s>USER: Look: {REGION} ASSISTANT:",
    "<image>",
    "<image><image>",
    "a <image> b <image>\n",
    "<image>\n",
    "<image> ",
    " <image>",
    "<mask><image><pos>",
    "<s><image></s>",
    "<image >",
]

NASTY = [
    *("", " ", "  ", "   ", "    ", "     ", " " * 14, " " * 17, " " * 33),
    *("\n", "\n\n", "\t", "\t\t ", "\r\n", "\v\f", " \n ", " \n \n"),
    *("a", " a", "  a", "a ", "a  ", "a  b", "a   b    c     d"),
    *("\na", "a\n", "a\n b\n\n  c", "\ta"),
    *("a\u00a0b", "a\u2003b", "a\u3000b", "\u200ba", "a\u2028b", "\ufeffBOM", "\u00adsoft", "a\u0085b"),
    *("▁", "▁▁", "▁a", "a▁b", " ▁ ", "▁ ▁a ▁", "<mask>▁<pos>", "_a_"),
    *("<mask>", "<pos>", REGION, REGION * 3, f"{REGION} ASSISTANT:", f"{REGION}.", f"{REGION}?"),
    *(f"{REGION},{REGION}", "<pos> ASSISTANT", "<pos>.", " <mask>", "<mask> ", "  <mask>  <pos>  "),
    *("a<mask>b<pos>c", "<pos>\n", "\n<mask>", "<pos>▁ASSISTANT", "<mask> 3", "<mask>狗", "<pos><mask>"),
    *("<mask> <mask>", "<mask>\t<pos>\r\n", "< mask >", "<mask", "mask>", "<Mask>", "<MASK>", "<<mask>>"),
    *("<mask/>", "<pos1>", "<po<pos>s>", "<region1>", "<s>", "</s>", "<unk>", "<s><s>", "<s>a", "a<s>"),
    *("a</s>b", "a </s> b", "</s>USER: a", "</s> USER: a", "< s >", "<unk>a<unk>", "</s", "s>", "<s"),
    *("<unk><mask></s><pos><s>", "<pad>", "[INST] a [/INST]", "<0x0A>", "<0x41>b"),
    *("0", "7", "12", "1234567890", "3.14159", "-1e-5", "1,000,000.00", " 5", "a5", "5a", "2024-02-29"),
    *("٣٤", "Ⅻ½²", "狗", "一只狗", "一只狗在草地上。", "dog 狗 dog", "日本語のテキスト"),
    *("한국어 텍스트", "Привет, мир!", "ελληνικά", "مرحبا بالعالم", "שלום", "नमस्ते दुनिया", "ภาษาไทย"),
    *("𠀀𠮷", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ﬁ ﬀ Ǆ", "ＦＵＬＬ　ｗｉｄｔｈ", "İıß", "Å\u212b"),
    *("🙂", "a 🙂 b", "👍🏽👍", "🇫🇷🇩🇪", "☺\ufe0f", "\u200d", "a\u200db"),
    *("👩\u200d👩\u200d👧\u200d👦", "\U0001f3f3\ufe0f\u200d\U0001f308"),
    *("\u00e9", "e\u0301", "caf\u00e9 cafe\u0301", "n\u0303o", "Z\u0351\u036b\u0343a\u0300\u0301\u0302"),
    *("\x00", "a\x00b", "\x01\x02\x1f", "\x7f", "\x1b[0m", "\ufffd", "\uffff", "\U0010ffff", "\ue000"),
    *("a" * 200, "supercalifragilisticexpialidocious" * 4, "the" * 60, "ab " * 40),
    *("=" * 77, "-" * 40, ".." * 9, "!?" * 8),
    "def f(x):\n    if x > 0:\n\treturn {'a': [1, 2]}\n",
    r"$\frac{a}{b} \leq \sum_{i=0}^{n} x_i^2$ \\ \begin{cases}",
    '{"regions": ["<mask><pos>", null], "n": 1e3}',
    "https://example.org/a?b=c&d=%20#e",
    "C:\\new\\table\\0 \"quoted\" 'single' `tick`",
    "I'm we'll don't it's — “quotes” … –",
    "USER: ASSISTANT:",
    "USER:  ASSISTANT: ",
    "ASSISTANT:ASSISTANT: 5",
    "Line one.\r\nLine two.\n\n\n- item\n  * item",
    "MiXeD CaSe wOrDs AND SHOUTING",
]

# Tokens to decode; all of them are in both models.
DECODE = [
    [],
    ["▁"],
    ["▁", "▁"],
    ["▁", "▁", "▁a", "▁"],
    ["▁a", "</s>"],
    ["<s>", "▁a", "<unk>", "▁b", "</s>"],
    ["▁a", "<mask>", "<pos>", "▁b"],
    ["<mask>", "▁", "▁a"],
    ["<mask>", "a"],
    ["</s>", "</s>"],
    ["a", "</s>", "b", "<s>", "▁c"],
    ["<0xE7>", "<0x8B>", "<0x97>"],
    ["▁", "<0xE7>", "<0x8B>", "<0x97>", "a"],
    ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁a"],
    ["<0xF0>", "<0x9F>", "</s>", "<0x99>", "<0x82>"],
    ["<0xF0>", "<0x9F>", "<0x99>"],
    ["<0xE7>", "<0x8B>", "a"],
    ["a", "<0xFF>", "b"],
    ["<0xFF>", "<0xFE>", "<0xC3>", "<0xA9>"],
    ["<0x80>"],
    ["<0xC3>", "<0xA9>", "<0x80>"],
    ["<0xC3>", "a", "<0xA9>"],
    ["<0xED>", "<0xA0>", "<0x80>"],
    ["<0xC0>", "<0x80>"],
    ["<0xF4>", "<0x90>", "<0x80>", "<0x80>"],
    ["▁a", "<0x0A>"],
    ["<0x0A>", "▁a", "<0x0A>", "<0x0A>", "b"],
    ["<0x09>", "a", "<0x20>", "<0x20>", "b", "<0x20>"],
    ["<0x20>", "a"],
    ["<0x00>", "a", "<0x00>"],
    ["<0xE3>", "<0x80>", "<0x80>", "a", "<0xC2>", "<0xA0>"],
    ["<0x61>", "<0xCC>", "<0x81>"],
    ["<0xE2>", "<0x96>", "<0x81>", "a"],
]

DIALOGUES = [
    [["What is it?", "A dog."]],
    [[f"<image>\n{OVERVIEW}{REGION}", "dog"], [REGION, "cat"], [REGION, "horse"]],
    [[f"<image>\n{OVERVIEW}How many? {REGION}", "3"], ["Which?", "12 or 13."], ["Sure?", "7"]],
    [[f"<image>\n{REGION} 是什么？", "狗"], ["Again?", "一只狗。"]],
    [["What is where?", f"The dog {REGION} is on {REGION}."], ["And?", REGION], ["More?", f"a {REGION}"]],
    [["Empty?", ""], ["Space?", " "], ["Spaces?", "   two  words  "]],
    [["", "a"], [" ", "b"], ["\n", "\nc\n"]],
    [["Say ASSISTANT: please", "ASSISTANT: USER: 5"], ["What? ASSISTANT:", "USER: no"]],
    [[f"<image>\n.\n{OVERVIEW}Look: {REGION}", '🙂 "Hm", he said.'], ["Why?", "(because)\n\n- of it"]],
    [["Show me.", "There: <image> and more."], ["Thanks", "<s>"]],
    [["Tell me <mask>", "<mask>"], ["<pos>", "<pos> 5"]],
    [["No image, but text only.", "Right. 1 2 3"], ["▁", "▁5"]],
]
CAPTIONS = ["a dog on the grass", "3 dogs", "狗", " spaced  caption ", "two\nlines", "", "newline last\n"]


def small_model() -> bytes:
    """A SentencePiece model with the options of Llama's, of 400 pieces, bytes included."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=writer,
        model_type="bpe",
        vocab_size=400,
        character_coverage=0.997,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    assert (pieces.id_to_piece(259), pieces.get_score(259)) == ("▁▁", 0)
    return writer.getvalue()


def load(model: bytes) -> Any:
    """The tokenizer as the original loads it, from a directory without a `tokenizer.json`."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokenizer.model").write_bytes(model)
        (directory / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": "<unk>"}))
        (directory / "tokenizer_config.json").write_text(json.dumps(special | settings))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, use_fast=True)
    assert isinstance(tokenizer, transformers.LlamaTokenizerFast)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_tokens(["<mask>", "<pos>"], special_tokens=True)
    return tokenizer


def tokens(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Ids of a text with `<image>` in it, and where in the text each token ends: BOS at 0."""
    found, start = [(tokenizer.bos_token_id, 0)], 0
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            start += len(IMAGE)
            found.append((IMAGE_ID, start))
        encoded = tokenizer(piece, return_offsets_mapping=True)
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        ends = [start + end for _, end in encoded.offset_mapping]
        found += list(zip(encoded.input_ids, ends, strict=True))[1:]
        start += len(piece)
    return found


def ids(tokenizer: Any, text: str) -> list[int]:
    return [token for token, _ in tokens(tokenizer, text)]


def dialogue(tokenizer: Any, turns: list[list[str]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and the places of those that carry loss."""
    text, answers = f"{TRAINING} ", []
    for question, answer in turns:
        text += f"USER: {question} ASSISTANT:"
        begin = len(text)
        text += f" {answer}</s>"
        answers.append((begin, len(text)))
    without = {*tokenizer.convert_tokens_to_ids(["<mask>", "<pos>"]), IMAGE_ID}
    found = tokens(tokenizer, text)
    places = [
        place
        for place, (token, end) in enumerate(found)
        if token not in without and any(first < end <= last for first, last in answers)
    ]
    return [token for token, _ in found], places


def caption(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The same for the template of image and caption."""
    found = ids(tokenizer, f"{IMAGE}{text}\n")
    return found, list(range(2, len(found)))


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of mixed alphabets with placeholders between."""
    rng = random.Random(seed)
    words = ["the", "dog", "a", "region", "ASSISTANT:", "USER:", "What", "is", "it?", "red,", "colour", "and"]
    places = ["<mask>", "<pos>", REGION, "<image>", "</s>", "<s>", "<unk>", "<mask", "pos>"]
    spaces = [" ", " ", " ", "  ", "   ", "\n", "\t", " \n", "▁", "\u00a0", ""]
    alphabets = [
        *("abcdefghijklmnopqrstuvwxyz", "ABCDEFG", "0123456789", "<>/smaskpo", " ▁"),
        *("狗猫草地上一只在", "éèüñçßøåœ", "абвгд", "🙂👍🏽👩\u200d", "\x00\x01\x7f\u0301\u0300\u200b\ufeff"),
        ".,:;!?'\"()[]{}<>/\\|_-+=*&^%$#@~`",
    ]
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 9)):
            kind = rng.random()
            if kind < 0.35:
                text += rng.choice(words)
            elif kind < 0.6:
                text += rng.choice(places)
            else:
                text += "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 6)))
            text += rng.choice(spaces)
        texts.append(text)
    return texts


def decode_cases(tokenizer: Any, seed: int) -> list[list[int]]:
    """Ids to decode: the tokens above, those of the nasty texts, and random ones, half of them bytes."""
    rng = random.Random(seed)
    cases = [[tokenizer.convert_tokens_to_ids(token) for token in case] for case in DECODE]
    assert all((0 in case) == ("<unk>" in names) for case, names in zip(cases, DECODE, strict=True))
    cases += [ids(tokenizer, text)[1:] for text in NASTY if len(text) < 40]
    for _ in range(80):
        cases.append([rng.randrange(rng.choice([259, len(tokenizer)])) for _ in range(rng.randint(1, 8))])
    return cases


def golden(models: dict[str, bytes]) -> dict[str, list[dict[str, Any]]]:
    """All cases with 4.31's answers; ids of a text are given for each model."""
    tokenizers = {name: load(model) for name, model in models.items()}
    asked = [f"{INFERENCE} USER: {question} ASSISTANT:" for question in PROTOCOL_QUESTIONS]
    asked += [f"{TRAINING} USER: {question} ASSISTANT:" for question in PROTOCOL_QUESTIONS[::3]]
    texts = [*asked, *PROTOCOL_QUESTIONS, *CHATS, *NASTY, *random_texts(300, seed=431)]
    cases: dict[str, list[dict[str, Any]]] = {"prompts": [], "decode": [], "dialogues": [], "captions": []}
    for text in dict.fromkeys(texts):
        cases["prompts"].append({"text": text} | {name: ids(t, text) for name, t in tokenizers.items()})
    for name, tokenizer in tokenizers.items():
        for case in decode_cases(tokenizer, seed=32):
            text = tokenizer.batch_decode([case], skip_special_tokens=True)[0].strip()
            cases["decode"].append({"model": name, "ids": case, "text": text})
        for turns in DIALOGUES:
            found, places = dialogue(tokenizer, turns)
            cases["dialogues"].append({"model": name, "turns": turns, "ids": found, "labelled": places})
        for text in CAPTIONS:
            found, places = caption(tokenizer, text)
            cases["captions"].append({"model": name, "caption": text, "ids": found, "labelled": places})
    return cases


def main() -> None:
    assert transformers.__version__ == "4.31.0", "another version answers differently"
    small = small_model()
    (HERE / "small.model").write_bytes(small)
    cases = golden({"small": small, "mistral": Path(sys.argv[1]).read_bytes()})
    parts = []
    for name, rows in cases.items():
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    (HERE / "golden.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="ascii")
    print({name: len(rows) for name, rows in cases.items()}, (HERE / "golden.json").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
