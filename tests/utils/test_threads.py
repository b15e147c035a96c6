"""`map_in_threads`: order; the number of torch's threads afterwards, also of concurrent threads."""

import subprocess
import sys
import threading

import pytest
import torch
from helpers.commands import ROOT

from hfvit.utils.threads import map_in_threads, torch_threads

CODE = """
import threading
import torch
from hfvit.utils.threads import map_in_threads

torch.set_num_threads(3)
{operation}
assert list(map_in_threads(lambda number: number**2, range(20), ahead=4, threads=2)) == [n**2 for n in range(20)]
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
numbers = [torch.get_num_threads()]
later = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
later.start()
later.join()
assert numbers == [3, 3], numbers
"""


@pytest.mark.parametrize("operation", ["", "torch.ones(1000, 1000) @ torch.ones(1000, 1000)"], ids=["first", "later"])
def test_map_in_threads_keeps_the_number_of_threads(operation):
    code = CODE.format(operation=operation)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_concurrent_contexts_keep_the_number_of_torchs_threads():
    before = torch.get_num_threads()
    entered, leave = threading.Event(), threading.Event()
    numbers = []

    def other():
        with torch_threads(2):
            numbers.append(torch.get_num_threads())
            entered.set()
            leave.wait(10)

    def run(function):
        thread = threading.Thread(target=function)
        thread.start()
        return thread

    try:
        torch.set_num_threads(3)
        with torch_threads(1):
            thread = run(other)
            entered.wait(10)
        leave.set()
        thread.join()
        run(lambda: numbers.append(torch.get_num_threads())).join()
        assert numbers == [2, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_the_map_keep_their_number():
    def numbers(_):
        with torch_threads(2):
            inner = torch.get_num_threads()
        return inner, torch.get_num_threads()

    assert set(map_in_threads(numbers, range(8), ahead=4, threads=2)) == {(2, 1)}
