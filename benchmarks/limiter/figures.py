"""What a part of the bench gives, and how it is printed: medians over the rounds, as Markdown tables."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import msgspec

from benchmarks.limiter.ground import Ground

DISTURBED_PERCENT = 5.0


class Row(msgspec.Struct, frozen=True):
    """One line of one round: `values` by column. `aim` is a text; rows of one `group` make one table."""

    name: str
    values: dict[str, float]
    aim: str = ""
    group: str = ""
    note: str = ""


class Round(msgspec.Struct, frozen=True):
    """`foreign_percent`: what processes of others took of the two cores while this was measured, 200 at most."""

    part: str
    number: int
    foreign_percent: float
    rows: list[Row]


class Part(msgspec.Struct, frozen=True):
    """`measure(ground, number of the round)`. `columns`: title by key, in order; a key ends in its unit.

    `once`: takes minutes, so it is measured in the first round only. `ratio`: the column whose value of each of
    `ratio_rows` is divided by that of every row of the same table.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    measure: Callable[[Ground, int], list[Row]]
    once: bool = False
    ratio: str = ""
    ratio_rows: tuple[str, ...] = ()


def tables(part: Part, rounds: Sequence[Round]) -> str:
    """All tables of a part; each figure is its own median, the spread is that of the first column."""
    rows = [row for each in rounds if each.part == part.name for row in each.rows]
    texts = []
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        texts.append((f"{group}\n\n" if group else "") + _table(part, own))
    return "\n\n".join(texts)


def _table(part: Part, rows: Sequence[Row]) -> str:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    keys = [key for key in part.columns if any(key in row.values for row in rows)]
    aims = any(row.aim for row in rows)
    notes = any(row.note for row in rows)
    yardsticks = {name: _median(by_name[name], part.ratio) for name in part.ratio_rows if name in by_name}
    head = ["", *(part.columns[key] for key in keys), "spread"]
    head += [*(f"{name} ×" for name in yardsticks), *["aim"] * aims, *["note"] * notes]
    lines = [head, ["---", *["---:"] * (len(head) - 1 - notes), *["---"] * notes]]
    for name, own in by_name.items():
        cells = [name, *(_cell(_median(own, key)) for key in keys), _spread(own, keys)]
        rate = _median(own, part.ratio)
        cells += [
            f"{yardstick / rate:,.1f}" if yardstick and rate else "" for yardstick in yardsticks.values()
        ]
        cells += [own[-1].aim] * aims + [own[-1].note] * notes
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _median(rows: Sequence[Row], key: str) -> float | None:
    values = [row.values[key] for row in rows if key in row.values]
    return statistics.median(values) if values else None


def _spread(rows: Sequence[Row], keys: Sequence[str]) -> str:
    values = [row.values[keys[0]] for row in rows if keys and keys[0] in row.values]
    middle = statistics.median(values) if values else 0.0
    if len(values) < 2 or not middle:
        return ""
    return f"{100 * (max(values) - min(values)) / middle:.0f} %"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
