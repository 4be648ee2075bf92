"""End quietly when Ctrl-C comes while a command's modules are imported.

Imports nothing that Python has not imported before it reads this, so that little of a start comes before.
"""

from __future__ import annotations

import os
import signal
import sys


class QuietInterrupt:
    """Lets SIGINT end the process with a word and exit code 130 during a block, instead of a traceback.

    An exception would not do: libraries catch it within their imports, and report that they are broken.
    Where SIGINT is ignored, as under nohup, it stays ignored.
    """

    def __enter__(self) -> None:
        self._is_set = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_set:
            signal.signal(signal.SIGINT, _end)

    def __exit__(self, *_: object) -> None:
        if self._is_set:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(_number: int, _frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# Seconds after which a Ctrl-C that Python could only report is delivered again.
_AGAIN_S = 0.05


def deliver_again() -> None:
    """From now on, deliver a Ctrl-C again that came where Python can raise nothing, as in a weakref callback.

    Python would print a traceback ("Exception ignored in") and go on as if there had been no Ctrl-C.
    """
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs, /) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)
            return
        import threading

        # A signal to the main thread itself, which a call that waits there notices.
        main = threading.main_thread().ident or 0
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
