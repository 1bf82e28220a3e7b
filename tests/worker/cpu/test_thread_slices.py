"""The slices of a thread, as the kernel says them."""

import ctypes
import platform
import threading

import pytest

from worker.cpu.thread_slices import ATTRIBUTES, LONG_SECONDS, SETATTR, take_long_slices


def slice_seconds() -> float:
    """Of the calling thread, by sched_getattr, whose number is the next."""
    found = ctypes.create_string_buffer(ATTRIBUTES.size)
    number = SETATTR[platform.machine()] + 1
    assert ctypes.CDLL(None).syscall(number, 0, found, ATTRIBUTES.size, 0) == 0
    return float(ATTRIBUTES.unpack(found.raw)[5]) / 1e9


def in_a_thread(work: "list[float]", *, is_long: bool) -> None:
    def run() -> None:
        if is_long:
            assert take_long_slices()
        work.append(slice_seconds())
        child = threading.Thread(target=lambda: work.append(slice_seconds()))
        child.start()
        child.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.skipif(
    platform.machine() not in SETATTR, reason="the system call's number is not known here"
)
def test_a_thread_and_its_children_have_long_slices_and_others_do_not() -> None:
    long: list[float] = []
    plain: list[float] = []
    in_a_thread(long, is_long=True)
    in_a_thread(plain, is_long=False)
    if plain[0] == 0:
        pytest.skip("the kernel has no slices of a thread's own")
    assert long == [LONG_SECONDS, LONG_SECONDS]
    assert plain[0] < LONG_SECONDS
    assert plain[1] == plain[0]
