"""torchrun, whose own reports do not hide what a rank has said: python -m utils.launch [torchrun's flags] train.py …

A rank that fails says why in a line, and torchrun ends the others; then this ends with that rank's status. It speaks
only where the rank could not: when it was killed.
"""

from utils.interrupt import begun

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # torchrun's own; ranks are processes of their own
    begun()
    try:
        main()
    except ChildFailedError as error:
        # Of those that ended before torchrun looked, one that was killed is why the others failed.
        rank, failure = min(error.failures.items(), key=lambda each: (each[1].exitcode >= 0, each[1].timestamp))
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} was killed ({name}); the others were ended", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except (KeyboardInterrupt, SignalException):
        sys.exit(130)
