"""The `outrider` command's first step: until all is imported, Ctrl-C simply ends the process.

Python loses a KeyboardInterrupt that comes while it cleans up after an import (it says "Exception
ignored in: <function _get_module_lock…>"), and the command would go on: about 1 of 300 Ctrl-Cs.
"""

import signal


def main() -> None:
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
