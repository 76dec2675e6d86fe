"""Check seconds by part and peak memory."""

import contextlib
import time

import pytest
from conftest import CPU
from makebelieve import CUDA, Gpu

from mixgpt.common.clock import Clock, peak_memory


def test_a_part_inside_another_counts_only_for_itself():
    clock = Clock(CPU)
    with clock.part("outer"):
        time.sleep(0.05)
        with clock.part("inner"):
            time.sleep(0.2)
        with clock.part("inner"):
            time.sleep(0.1)
    assert 0.3 <= clock.seconds["inner"] < 0.4
    assert 0.05 <= clock.seconds["outer"] < 0.15


def test_a_gpu_is_waited_for_only_where_seconds_are_read():
    with Gpu() as gpu:
        clock = Clock(CUDA)
        for _ in range(2):
            with clock.part("outer"):
                time.sleep(0.05)
                with clock.part("inner"):
                    time.sleep(0.1)
        assert not gpu.synchronisations
        assert 0.2 <= clock.seconds["inner"] < 0.3
        assert 0.1 <= clock.seconds["outer"] < 0.19
        assert gpu.synchronisations.total() == 1


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_part_that_an_error_ends_is_counted_like_others(device):
    with Gpu():
        clock = Clock(device)
        with clock.part("all"):
            with contextlib.suppress(KeyError), clock.part("outer"), clock.part("inner"):
                time.sleep(0.1)
                raise KeyError
            with clock.part("inner"):
                time.sleep(0.1)
        assert 0.2 <= clock.seconds["inner"] < 0.3
        assert max(clock.seconds["outer"], clock.seconds["all"]) < 0.05


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(CPU)["host"]
    held = bytearray(b"x") * (before + 50_000_000)
    assert peak_memory(CPU)["host"] >= len(held)
