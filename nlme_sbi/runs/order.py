"""Which run was finished last, where clocks may have gone back."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any


def order_of_finishing(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The run with the latest date, and those that were finished after it though their clock says otherwise.

    A manifest names the run that was the newest of its experiment when it was written; a run that was made again has
    another date. So a clock that went back is noticed and not believed: the last one of the list is the newest.

    Args:
        manifests: by the name of the run's directory, with ``created`` and ``previous``; at least one.
    """
    times = {name: datetime.datetime.fromisoformat(one["created"]) for name, one in manifests.items()}
    order = [max(times, key=lambda name: times[name])]
    while True:
        mark = {"run": order[-1], "created": manifests[order[-1]]["created"]}
        later = [name for name, one in manifests.items() if one.get("previous") == mark and name not in order]
        if not later:
            return order
        order.append(max(later, key=lambda name: times[name]))
