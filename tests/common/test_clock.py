"""Check seconds by part, on a clock that goes on when it is told to, and peak memory."""

import contextlib
import time

import pytest
from conftest import CPU
from makebelieve import CUDA, Gpu

from mixgpt.common.runtime import Clock


@pytest.fixture
def wait(monkeypatch):
    """Return a function that lets seconds pass."""
    now = [100]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_gpu_is_waited_for_only_where_seconds_are_read(wait):
    with Gpu() as gpu:
        clock = Clock(CUDA)
        for _ in range(2):
            with clock.part("outer"):
                wait(5)
                with clock.part("inner"):
                    wait(10)
        assert not gpu.synchronisations
        assert clock.seconds() == {"outer": 10, "inner": 20}
        assert gpu.synchronisations.total() == 1


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_part_that_an_error_ends_is_counted_like_others(device, wait):
    with Gpu():
        clock = Clock(device)
        with clock.part("all"):
            with contextlib.suppress(KeyError), clock.part("outer"), clock.part("inner"):
                wait(10)
                raise KeyError
            with clock.part("inner"):
                wait(10)
        assert clock.seconds()["inner"] == 20
        assert clock.seconds()["outer"] == clock.seconds()["all"] == 0
