"""Prompts about an image as the engine takes them: token ids with the image's places, beginnings shared."""

import itertools
from typing import NamedTuple

from osprey_jax.engine import Asked, Prepared
from osprey_jax.prompt import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    MASK_TOKEN,
    POSITION_TOKEN,
    Tokenizer,
    tokenize,
)


class PromptIds(NamedTuple):
    """Makes ids of prompts; ValueErrors say what is wrong with one."""

    tokenizer: Tokenizer
    image_tokens: int
    """Places that an image takes."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of a prompt, BOS first, -200 for `<image>`."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be text, got {text!r}")
        return tokenize(self.tokenizer, text)

    def expand(self, text: str, *, regions: int) -> list[int]:
        """Ids of a prompt with the image's places; it has to name one image and so many regions."""
        ids = self.tokenize(text)
        for name, token, expected in (
            (IMAGE_TOKEN, IMAGE_TOKEN_ID, 1),
            (MASK_TOKEN, self.tokenizer.mask_id, regions),
            (POSITION_TOKEN, self.tokenizer.position_id, regions),
        ):
            if (count := ids.count(token)) != expected:
                raise ValueError(
                    f"the prompt must hold {name} {expected} times, it does so {count} times: {text!r}"
                )
        region = (self.tokenizer.mask_id, self.tokenizer.position_id)
        if list(itertools.pairwise(ids)).count(region) != regions:
            raise ValueError(
                f"each {MASK_TOKEN} of a prompt must be followed by its {POSITION_TOKEN}: {text!r}"
            )
        place = ids.index(IMAGE_TOKEN_ID)
        return ids[:place] + [IMAGE_TOKEN_ID] * self.image_tokens + ids[place + 1 :]

    def asked(self, prepared: Prepared, prompts: tuple[str, ...]) -> Asked:
        """What all prompts begin with, and what follows for each region: one prompt for all or for each."""
        count = prepared.regions
        if len(prompts) not in (1, count):
            raise ValueError(f"give one question, or one for each region: {len(prompts)} for {count} regions")
        ids = {text: self.expand(text, regions=1) for text in set(prompts)}
        split = min(each.index(self.tokenizer.mask_id) for each in ids.values())
        first, *others = (each[:split] for each in ids.values())
        for other in others:
            split = next((i for i in range(split) if first[i] != other[i]), split)
        for text, each in ids.items():
            if IMAGE_TOKEN_ID in each[split:]:
                raise ValueError(
                    f"prompts about one image must be equal up to its {IMAGE_TOKEN}, which stands before "
                    f"{MASK_TOKEN}: {text!r}"
                )
        rest = [ids[text][split:] for text in prompts]
        return Asked(prepared, first[:split], rest if len(rest) == count else rest * count)
