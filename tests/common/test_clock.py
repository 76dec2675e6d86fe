"""Check seconds by part and peak memory."""

import time

from conftest import CPU

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


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(CPU)["host"]
    held = bytearray(b"x") * (before + 50_000_000)
    assert peak_memory(CPU)["host"] >= len(held)
