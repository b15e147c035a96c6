"""What a builder tells while it works: its errors, and how far it is. The classes derive from the backend's own."""

import sys
from threading import Event

from tqdm import tqdm

from hfvit.errors import one_line

BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"


def message_log(trt, verbose: bool):
    """A logger that keeps errors for `reason()` and shows the rest on standard error when `verbose`."""

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = []

        def log(self, severity, message) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(one_line(message))
            elif verbose:
                print(f"{trt.__name__}: {severity.name.lower()}: {message}", file=sys.stderr)

        def reason(self) -> str:
            """The first error, which causes those that follow."""
            return self.errors[0][:400] if self.errors else "it gives no reason; --verbose shows what it did."

    return Log()


def build_progress(trt, stopped: Event, show: bool):
    """A progress monitor that draws one bar, on a terminal only, and ends the build once `stopped` is set."""

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.percent = 0.0
            hidden = None if show else True
            self.bar = tqdm(total=100, desc="build", disable=hidden, leave=False, bar_format=BAR, miniters=0)
            self.phases = {}  # name -> [steps, done], outermost first; those that have begun and not ended

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            self.phases[phase_name] = [max(num_steps, 1), 0]
            self.bar.set_description(phase_name, refresh=False)

        def step_complete(self, phase_name, step) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][1] = step + 1
                self._draw()
            return not stopped.is_set()

        def phase_finish(self, phase_name) -> None:
            self.phases.pop(phase_name, None)

        def _draw(self) -> None:
            """A phase counts inside the step of its parent that it is part of."""
            share = 0.0
            for steps, done in reversed(self.phases.values()):
                share = min(1.0, (done + share) / steps)
            self.percent = max(self.percent, 100 * share)
            self.bar.update(self.percent - self.bar.n)

        def close(self) -> None:
            self.bar.close()

    return Progress()
