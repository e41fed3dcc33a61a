"""Kept: tensors that are made once and looked up again, as many as fit in a number of bytes.

The least recently used go first. What somebody else holds lives on; it is no longer found here.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from torch import Tensor


class Kept:
    """At most `most_bytes` of tensors, which must not be written to. One that is larger than that
    by itself is made anew each time."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of `key`, by `make` if it is not here."""
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
                return self._tensors[key]
        # Not under the lock: what makes one may ask for another.
        made = make()
        with self._lock:
            if key not in self._tensors and made.nbytes <= self.most_bytes:
                self._tensors[key] = made
                self.bytes += made.nbytes
            while self.bytes > self.most_bytes:
                self.bytes -= self._tensors.popitem(last=False)[1].nbytes
        return made
