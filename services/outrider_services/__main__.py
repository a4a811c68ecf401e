"""The `outrider` command's first step: until all is imported, Ctrl-C simply ends the process.

Python loses a KeyboardInterrupt that comes while it cleans up after an import (it says "Exception
ignored in: <function _get_module_lock…>"), and the command would go on: about 1 of 300 Ctrl-Cs.
"""

import os
import signal
import sys


def open_closed_streams() -> None:
    """Let stdin, stdout and stderr be something: else what is opened next would be taken for one.

    Where one is closed, as some supervisors do it, the event loop ends the process.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
            stream = open(number, mode, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def main() -> None:
    open_closed_streams()
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # not where Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from outrider_services import outlet
    from outrider_services.commands import cli

    signal.signal(signal.SIGINT, interrupt)
    outlet.install()
    cli.main()


if __name__ == "__main__":
    main()
