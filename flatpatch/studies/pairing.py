"""Which runs of a study stand on the sides of a hypothesis, and which of them belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatpatch.errors import UserError
from flatpatch.settings import DEFAULTS, shown
from flatpatch.studies.planning import Cell, Value, told, typed, varying
from flatpatch.studies.quantities import Reader, of_side, reduced
from flatpatch.studies.result import Pair, Point
from flatpatch.studies.schema import Hypothesis, Quantity, Side, Slope


@dataclass(frozen=True)
class Seen:
    """One number of one run.

    Attributes:
        cell: The run.
        task: The task, empty where the number is one of the run.
        number: The number.
    """

    cell: Cell
    task: str
    number: float


@dataclass(frozen=True)
class Couple:
    """Two numbers that belong together; ``against`` is None where a side stands alone."""

    cell: Cell
    task: str
    side: float
    against: float | None

    @property
    def difference(self) -> float:
        """Side minus against."""
        return self.side - (self.against or 0.0)


@dataclass(frozen=True)
class Comparison:
    """What one hypothesis compares with what.

    Attributes:
        cells: The study's runs.
        hypothesis: The hypothesis.
        against: Its opposite side, or a control.
        arm: By which way of measuring.
    """

    cells: Sequence[Cell]
    hypothesis: Hypothesis
    against: Side | None
    arm: str

    def couples(self, reader: Reader) -> list[Couple]:
        """Return every pair there is: of one seed, one task, and equal in whatever else differs between the runs."""
        side, against = self.hypothesis.side, self.against
        here = self._seen(reader, side, against)
        if against is None:
            return [Couple(seen.cell, seen.task, seen.number, None) for seen in here]
        if against.constant is not None:
            return [Couple(seen.cell, seen.task, seen.number, against.constant) for seen in here]
        there = self._seen(reader, against, side)
        keys = self._shared_keys()
        found = []
        for seen in here:
            fitting = [
                other.number
                for other in there
                if (other.cell.seed, other.task) == (seen.cell.seed, seen.task)
                and all(_agree(seen.cell, other.cell, key) for key in keys)
            ]
            if fitting:
                found.append(Couple(seen.cell, seen.task, seen.number, math.fsum(fitting) / len(fitting)))
        return found

    def points(self, reader: Reader, slope: Slope) -> dict[str, list[Point]]:
        """Return what slopes are laid through, one list for each straight line."""
        lines: dict[str, list[Point]] = {}
        for couple in self.couples(reader):
            x = self.place(reader, slope, couple)
            if x is not None:
                # A line over another quantity goes through all runs of its seed, whatever their settings.
                without = varying(self.cells) if slope.over is None else (slope.over,)
                label = self.label(couple, without=without)
                lines.setdefault(label, []).append(Point(label, couple.cell.seed, x, couple.difference))
        return {label: line for label, line in lines.items() if len({point.x for point in line}) > 1}

    def place(self, reader: Reader, slope: Slope, couple: Couple) -> float | None:
        """Return where a pair stands in what a slope goes over; None where that has no number."""
        quantity = slope.over_quantity
        if quantity is None:
            number: Value | None = couple.cell.value(str(slope.over))
        else:
            own = of_side(quantity, Side(), self.arm if quantity.as_recorded else "")
            number = reduced(reader.values(own, couple.cell), own, None).get(couple.task)
        if isinstance(number, str) or number is None or (slope.scale != "plain" and number <= 0):
            return None
        return {"plain": float, "log2": math.log2, "log10": math.log10}[slope.scale](number)

    def fitting(self, side: Side) -> list[Cell]:
        """Return the runs that stand on a side."""
        opposite = self.against if side is self.hypothesis.side else self.hypothesis.side
        wanted: dict[str, Value] = {}
        if opposite is not None:
            wanted = {key: DEFAULTS.get(key, "") for key in opposite.settings}
        wanted |= {key: typed(key, text) for key, text in side.settings.items()}
        if side.run is not None or (opposite is not None and opposite.run is not None):
            # Of runs that are named, the names say what the other side's settings would.
            wanted = {key: value for key, value in wanted.items() if key in side.settings}
        return [
            cell
            for cell in self.cells
            if (side.run is None or cell.name in side.run)
            and all(cell.value(key) == value or (key in cell.idle) for key, value in wanted.items())
        ]

    def _seen(self, reader: Reader, side: Side, opposite: Side | None) -> list[Seen]:
        quantity = of_side(self.hypothesis.quantity, side, self.arm)
        others_than = None
        if opposite is not None:
            others_than = of_side(self.hypothesis.quantity, opposite, self.arm).task
        cells = {str(cell.plan.folder): cell for cell in self.fitting(side)}.values()  # each run once
        numbers = {cell: reduced(reader.values(quantity, cell), quantity, others_than) for cell in cells}
        if quantity.reduce == "seed_spread":
            numbers = _spread_over_seeds(numbers, self._other_settings)
        return [
            Seen(cell, task, number)
            for cell, by_task in numbers.items()
            for task, number in by_task.items()
            if number is not None
        ]

    def _other_settings(self, cell: Cell) -> tuple[Value, ...]:
        return tuple(cell.value(key) for key in varying(self.cells))

    def _shared_keys(self) -> tuple[str, ...]:
        """Return the settings in which a pair must agree."""
        side, against = self.hypothesis.side, self.against
        assert against is not None
        left_out = {*self.hypothesis.ignore, *side.settings, *against.settings}
        keys: tuple[str, ...] = varying(self.cells)
        if side.run and against.run and side.run != against.run:
            groups = [[cell for cell in self.cells if cell.name in names] for names in (side.run, against.run)]
            keys = tuple(dict.fromkeys(key for group in groups for key in varying(group)))
        return tuple(key for key in keys if key not in left_out)

    def label(self, couple: Couple, without: Sequence[str] = ()) -> str:
        """Return what a pair shares: its seed, its task, and what else varies."""
        left_out = {*self.hypothesis.side.settings, *(self.against.settings if self.against else ()), *without}
        if self.hypothesis.side.run:  # what all its runs have needs no telling
            keys = varying([cell for cell in self.cells if cell.name in self.hypothesis.side.run])
        else:
            keys = varying(self.fitting(self.hypothesis.side))
        cell = couple.cell
        told_of = [key for key in keys if key not in left_out and key not in cell.idle and cell.value(key) != ""]
        own = [f"{key}={shown(cell.value(key))}" for key in told_of]
        return ", ".join([f"seed {cell.seed}", *own, *([couple.task] if couple.task else [])])


def as_pairs(comparison: Comparison, couples: Sequence[Couple]) -> tuple[Pair, ...]:
    """Return pairs in the form that the verdicts are kept in."""
    return tuple(Pair(comparison.label(each), each.cell.seed, each.side, each.against) for each in couples)


def side_words(side: Side, quantity: Quantity) -> str:
    """Return a side in words: its runs, and what of the quantity it has for itself."""
    if side.constant is not None:
        return f"{side.constant:g}"
    parts = [f"runs {', '.join(side.run)}" if side.run else "", told(dict(side.settings)) if side.settings else ""]
    parts += [f"scope {side.scope}" if side.scope else "", f"{side.when} training" if side.when else ""]
    parts += [f"task {side.task}" if side.task else ""]
    parts += [{"spread": "spread over tasks", "seed_spread": "spread over seeds"}.get(side.reduce or "", "")]
    parts += [side.value if side.value and side.value != quantity.value else ""]
    return ", ".join(filter(None, parts)) or "every run"


def _agree(one: Cell, other: Cell, key: str) -> bool:
    return one.value(key) == other.value(key) or key in one.idle or key in other.idle


def _spread_over_seeds(
    numbers: Mapping[Cell, Mapping[str, float | None]], settings_of: Callable[[Cell], tuple[Value, ...]]
) -> dict[Cell, dict[str, float | None]]:
    """Give each seed its share of the spread over the seeds.

    Over runs that differ by their seed alone, of n seeds, the share is ``sqrt(mean_t (x_t - mean_t)^2 n / (n - 1))``
    over the tasks t: the root mean square of the shares is the pooled standard deviation over seeds.
    """
    groups: dict[tuple[Value, ...], list[Cell]] = {}
    for cell in numbers:
        groups.setdefault(settings_of(cell), []).append(cell)
    found: dict[Cell, dict[str, float | None]] = {}
    for cells in groups.values():
        tasks = [task for task in numbers[cells[0]] if all(numbers[cell].get(task) is not None for cell in cells)]
        n = len(cells)
        for cell in cells:
            if n < 2 or not tasks:
                found[cell] = {"": None}
                continue
            squares = []
            for task in tasks:
                column = [float(numbers[other][task] or 0.0) for other in cells]
                squares.append((float(numbers[cell][task] or 0.0) - math.fsum(column) / n) ** 2 * n / (n - 1))
            found[cell] = {"": math.sqrt(math.fsum(squares) / len(squares))}
    return found


def each_of(hypothesis: Hypothesis, cells: Sequence[Cell]) -> list[Hypothesis]:
    """Return a hypothesis, or of one with ``for_each`` one for every value that the side's runs have.

    Raises:
        UserError: If none of the runs has such a setting.
    """
    if not hypothesis.for_each:
        return [hypothesis]
    first, *rest = hypothesis.for_each
    fitting = Comparison(cells, hypothesis, hypothesis.against, "").fitting(hypothesis.side)
    values = [value for value in dict.fromkeys(cell.value(first) for cell in fitting) if value != ""]
    if not values:
        raise UserError(f"hypothesis {hypothesis.id!r}: no run has a value of {first!r}, over which for_each goes")
    found = []
    for value in values:
        own = {first: shown(value)}
        name = hypothesis.id[:-1] + "," if hypothesis.id.endswith("]") else hypothesis.id + "["
        found += each_of(
            hypothesis.model_copy(
                update={
                    "id": f"{name}{first}={shown(value)}]",
                    "statement": f"{hypothesis.statement} ({first}={shown(value)})",
                    "for_each": tuple(rest),
                    "side": _with(hypothesis.side, own),
                    "against": hypothesis.against and _with(hypothesis.against, own),
                    "controls": {key: _with(side, own) for key, side in hypothesis.controls.items()},
                }
            ),
            cells,
        )
    return found


def _with(side: Side, settings: Mapping[str, str]) -> Side:
    return side if side.constant is not None else side.model_copy(update={"settings": {**side.settings, **settings}})
