"""Work in forked processes, which may be killed."""

import os
import sys
from collections.abc import Callable


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process, in which MLX must not have been used before; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
