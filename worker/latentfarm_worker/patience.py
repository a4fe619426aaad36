"""Waiting for a service that may refuse for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from latentfarm_shared.errors import Unavailable
from latentfarm_shared.logs import log

PATIENCE_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)

T = TypeVar("T")


def patiently(action: Callable[[], T]) -> T:
    """Do something that a service may refuse for a while; give up after about 40 s.

    Raises:
        Unavailable: it refused to the end.
    """
    for pause_s in PATIENCE_S:
        try:
            return action()
        except Unavailable as error:
            log.warning("will try again", error=str(error), in_s=pause_s)
            time.sleep(pause_s)
    return action()
