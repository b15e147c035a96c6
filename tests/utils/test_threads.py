"""`map_in_threads`: order, and the number of torch's threads afterwards."""

import subprocess
import sys

import pytest
from helpers.commands import ROOT

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
