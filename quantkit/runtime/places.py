"""Who has which places of a cache: stretches, each for a text."""

from dataclasses import dataclass


@dataclass(eq=False)
class Stretch:
    """``size`` places from ``first`` on."""

    first: int
    size: int

    @property
    def end(self) -> int:
        return self.first + self.size


class Places:
    """``total`` places in a row, of which ``used`` are taken."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._taken: list[Stretch] = []  # in their order

    def take(self, size: int) -> Stretch | None:
        """The first gap that is large enough, or None: there may be room in several together."""
        begin = 0
        for index, after in enumerate([*self._taken, Stretch(self.total, 0)]):
            if after.first - begin >= size:
                self._taken.insert(index, found := Stretch(begin, size))
                self.used += size
                return found
            begin = after.end
        return None

    def give(self, stretch: Stretch) -> None:
        """It is free again."""
        self._taken.remove(stretch)
        self.used -= stretch.size

    def close_up(self) -> list[tuple[Stretch, int]]:
        """Move all to the left, so that what is free is one gap: the stretches that have another
        place now, in their order, and where each was before. What lies in them can be moved one
        after the other."""
        moved, begin = [], 0
        for stretch in self._taken:
            if stretch.first != begin:
                moved.append((stretch, stretch.first))
                stretch.first = begin
            begin = stretch.end
        return moved
