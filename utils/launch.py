"""torchrun, whose own reports do not hide what a rank has said: python -m utils.launch [torchrun's flags] train.py …

A rank that fails says why in a line, and torchrun ends the others; then this ends with that rank's status. It speaks
only where the rank could not: when it was killed.
"""

from utils.interrupt import begun

import logging
import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main

PATIENCE = 15  # seconds, of the 30 that torchrun gives those it ends before it kills them


def cause(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank for which the others failed or were ended.

    Of those that ended before torchrun looked, one that was killed is why the others failed. torchrun ends the rest by
    SIGTERM, and kills what is still there half a minute later.
    """
    first = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, bool]:
        failure = failures[rank]
        ended = failure.exitcode == -signal.SIGTERM
        return failure.timestamp - first > PATIENCE, ended, failure.exitcode >= 0

    return min(sorted(failures), key=order)


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's own; ranks are processes of their own
    begun()
    try:
        main()
    except ChildFailedError as error:
        rank = cause(error.failures)
        status = error.failures[rank].exitcode
        if status < 0:
            print(f"rank {rank} was killed ({signal.Signals(-status).name}); the others were ended", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
