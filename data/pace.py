"""Whatever a server sends has an end, in bytes and in time."""

import time

LARGEST_MANIFEST = 2**28  # bytes; a tenth is enough for a thousand million images in shards of 10,000
PATIENCE = 30.0  # seconds in which something must arrive
LEAST_RATE = 128  # bytes a second that must have arrived, on average, after that time


class Pace:
    """Ends a transfer that goes on without end.

    Args:
        most: bytes that there are at most.
    """

    def __init__(self, most: int):
        self.most, self.bytes, self.began = most, 0, time.monotonic()

    def add(self, count: int) -> bool:
        """Count bytes that arrived; whether there are more of them than there can be.

        Raises:
            TimeoutError: they arrive too slowly.
        """
        self.bytes += count
        seconds = time.monotonic() - self.began
        if seconds > PATIENCE and self.bytes < LEAST_RATE * seconds:
            raise TimeoutError(f"only {self.bytes} bytes arrived in {seconds:.0f} s")
        return self.bytes > self.most
