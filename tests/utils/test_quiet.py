"""Output of the process after it was silenced."""

import logging
import sys
import threading

from hfvit.utils.quiet import silenced


def test_silenced_in_two_threads_restores_output_and_logs():
    before = sys.stdout, sys.stderr, logging.root.manager.disable
    other_is_in, first_is_out = threading.Event(), threading.Event()

    def other():
        with silenced():
            other_is_in.set()
            first_is_out.wait(10)

    thread = threading.Thread(target=other)
    with silenced():
        assert sys.stdout is not before[0]
        thread.start()
        other_is_in.wait(0.2)
    first_is_out.set()
    thread.join()
    assert (sys.stdout, sys.stderr, logging.root.manager.disable) == before
