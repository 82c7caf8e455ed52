"""A bounded copy of what a program prints: its beginning and its end."""

from __future__ import annotations


class Output:
    """Takes any amount, keeps at most `bytes_max` bytes."""

    def __init__(self, bytes_max: int) -> None:
        self._first_bytes_max = bytes_max // 2
        self._last_bytes_max = bytes_max - self._first_bytes_max
        self._first = bytearray()
        self._last = bytearray()
        self._bytes_cut = 0

    def take(self, data: bytes) -> None:
        """Add what was printed next."""
        space = self._first_bytes_max - len(self._first)
        self._first += data[:space]
        self._last += data[space:]
        over = len(self._last) - self._last_bytes_max
        if over > 0:
            del self._last[:over]
            self._bytes_cut += over

    @property
    def cut(self) -> bool:
        """Whether something was left out."""
        return self._bytes_cut > 0

    def text(self) -> str:
        """Return what was kept, and between its halves how much is not there. What is no text is replaced."""
        between = f"\n… {self._bytes_cut} bytes left out …\n".encode() if self.cut else b""
        text = (bytes(self._first) + between + bytes(self._last)).decode(errors="replace").replace("\r\n", "\n")
        return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
