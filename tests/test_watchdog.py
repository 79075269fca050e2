"""A hanging step is told, with what it is at and where."""

import threading

import pytest

from osprey_jax.watchdog import Watchdog


def test_what_takes_too_long_is_told_with_the_stacks_of_all_threads(
    capfd: pytest.CaptureFixture[str],
) -> None:
    told, heard = [], threading.Event()

    def say(message: str) -> None:
        told.append(message)
        heard.set()

    watchdog = Watchdog(0.05, say)
    watchdog.at("step 7")

    def hang_here() -> bool:
        return heard.wait(60)

    assert hang_here()
    watchdog.close()
    assert told[0].startswith("warning: step 7 has taken ")
    assert "in hang_here" in capfd.readouterr().err


def test_it_can_be_switched_off() -> None:
    before = threading.active_count()
    watchdog = Watchdog(0, print)
    assert threading.active_count() == before
    watchdog.close()
