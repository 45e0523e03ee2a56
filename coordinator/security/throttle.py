"""How often one address may do what costs the others something: a token bucket for each, of a bounded number."""

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from threading import Lock

_MAX_ADDRESSES = 10_000


class Throttle:
    """`burst` at once, then `per_minute`. Safe to use from many threads; `clock` gives seconds that never go back."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_minute / 60, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # (tokens, when they were counted)
        self._lock = Lock()

    def wait_seconds(self, address: str) -> float:
        """Takes a token of the address: 0, or the seconds until there is one again, and then none is taken."""
        with self._lock:
            now, key = self._clock(), _group(address)
            tokens, counted = self._left.pop(key, (float(self._burst), now))
            tokens = min(float(self._burst), tokens + (now - counted) * self._per_second)
            has_one = tokens >= 1
            self._left[key] = (tokens - 1 if has_one else tokens, now)
            if len(self._left) > _MAX_ADDRESSES:
                self._left.popitem(last=False)  # the one that asked longest ago has the most tokens back
            return 0.0 if has_one else (1 - tokens) / self._per_second


def _group(address: str) -> str:
    """Whoever has one IPv6 address has its whole network of 64 bits."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return ""  # not from a socket: all of them share one bucket
    return str(int(parsed) >> 64) if isinstance(parsed, IPv6Address) else address
