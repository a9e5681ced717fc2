"""TensorBoard's event files of a run that several processes write, one after the other."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)
_SECOND = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
#: Seconds that the clock may be behind the newest file before it is not worth waiting.
_LONGEST_WAIT_S = 5.0


def event_writer(folder: Path, start: int) -> SummaryWriter:
    """A writer whose events follow on those of earlier processes.

    TensorBoard reads files in the order of their names, which begin with a whole second and end with numbers in no
    order, and takes an event of an earlier step as the begin of the run anew. So two files of one second would hide the
    newer one's curve: a process that was restarted at once waits until the second has passed.

    Args:
        folder: of the event files; made if missing.
        start: first step of this process; what an earlier one wrote from there on is hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    wait_s = _newest_second(folder) + 1 - time.time()
    if wait_s > _LONGEST_WAIT_S:
        _log.warning("event files in %s are of the future: until the clock is there, curves may end early", folder)
    elif wait_s > 0:
        time.sleep(wait_s)
    return SummaryWriter(str(folder), purge_step=start)


def _newest_second(folder: Path) -> int:
    found = (_SECOND.fullmatch(path.name) for path in folder.glob("events.out.tfevents.*"))
    return max((int(match[1]) for match in found if match), default=-1)
