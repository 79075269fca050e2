"""Stands for the model, in the tests' process or as `python -m tests.label.stand_in ARGUMENTS`."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from osprey_jax.label import command, plan
from osprey_jax.predictor import Generation
from osprey_jax.recognize import Recognition
from osprey_jax.request import Request
from osprey_jax.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
UNIT_IMAGES = 2


class Seen(NamedTuple):
    """What is kept of an image."""

    brightness: int
    areas: list[int]


class StandIn:
    """Answers depend on image, mask, question and on what else is asked in one go."""

    loads: list[tuple[Any, ...]]
    calls: int
    interrupted_at: int | None
    """The call in which Ctrl-C is pressed."""

    def __init__(self, delay: float = 0.0):
        self.loads, self.delay = [], delay
        self.calls, self.interrupted_at = 0, None

    def load(self, directory: Any, dtype: str | None = None, *, quantize: str | None = None) -> "StandIn":
        self.loads.append((directory, dtype, quantize))
        return self

    def prepare(self, image: np.ndarray, masks: np.ndarray) -> Seen:
        assert masks.dtype == bool
        assert masks.shape[1:] == image.shape[:2]
        return Seen(int(image.sum()), masks.sum((1, 2)).tolist())

    def _work(self) -> None:
        time.sleep(self.delay)
        self.calls += 1
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt

    def answer(self, prepared: Sequence[Seen], asked: Request) -> list[list[Generation]]:
        self._work()
        together = sum(len(one.areas) for one in prepared)
        return [
            [
                Generation(
                    f"Région of {area} <pixels>, {one.brightness}, among {together}.",
                    [area, 2],
                    [-area / 7, -1 / (asked.decoding.seed + 3)],
                )
                for area in one.areas
            ]
            for one in prepared
        ]

    def recognize(
        self,
        prepared: Sequence[Seen],
        labels: Vocabulary,
        *,
        question: str | None,
        threshold: float,
        min_logprob: float,
    ) -> list[list[Recognition]]:
        self._work()
        together = sum(len(one.areas) for one in prepared)

        def recognition(area: int) -> Recognition:
            number = (area + together + len(question or "")) % len(labels.labels)
            probability, logprob = 1 / (1 + number / 3), -number - area / 7000
            sure = probability >= threshold and logprob >= min_logprob
            return Recognition(labels.labels[number] if sure else None, probability, logprob)

        return [[recognition(area) for area in one.areas] for one in prepared]


if __name__ == "__main__":
    command.Osprey = StandIn(float(os.environ["DELAY"]))
    plan.UNIT_IMAGES = UNIT_IMAGES
    sys.exit(command.main())
