"""Count of the rows of a source that give no record, by reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from medm.errors import DataError


@dataclass(slots=True)
class LeftOut:
    """Rows that give no record: how many for each reason, and the first of them."""

    keep: int = 1
    """Rows that are listed for each reason."""
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, fault: DataError) -> None:
        """Count a row.

        Args:
            reason: the same words for every row of the kind.
            fault: the row, and what is wrong with it in particular.
        """
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.kept.setdefault(reason, [])
        if len(kept) < self.keep:
            kept.append(str(fault))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a reason, with the first row; below it the further rows that are kept."""
        lines = []
        for reason, count in self.counts.items():
            first, *further = self.kept[reason]
            lines.append(f"{count} left out: {reason}; the first: {first}")
            lines += [f"  {row}" for row in further]
            if further and count > self.keep:
                lines.append(f"  ... and {count - self.keep} more")
        return lines
