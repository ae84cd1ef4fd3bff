"""From results to a Markdown table, and to one small SVG of panels."""

import math
from collections.abc import Iterable, Sequence

from benchmarks.simulator.measure import Result, Worst

HEAD = (
    "world",
    "away",
    "over",
    "inside",
    "edge",
    "admitted",
    "ten windows",
    "refused wrongly",
    "calls/1,000",
    "scripts/s",
    "recalls/1,000",
    "from memory",
    "alone",
    "bounds",
)

PANEL_WIDTH, PANEL_HEIGHT = 320, 170
PLOT_LEFT, PLOT_TOP, PLOT_WIDTH, PLOT_HEIGHT = 44, 26, 264, 112
COLUMNS = 3

INK, GRID, LIMIT, BOUND, LINE, AWAY = "#333", "#ddd", "#c33", "#e90", "#06c", "#eee"


def table(results: Iterable[Result]) -> str:
    lines = [
        HEAD,
        ("---", "---", *["---:"] * (len(HEAD) - 3), "---"),
        *(_cells(result) for result in results),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(result: Result) -> tuple[str, ...]:
    world = result.world
    thousands = max(1, result.requests) / 1_000
    return (
        world.title,
        world.redis_down,
        _over(result.worst, "free"),
        _over(result.worst, "inside"),
        _over(result.worst, "edge"),
        f"{result.admitted_percent:.2f} %",
        f"{result.ten_percent:.2f} %",
        f"{result.wrong:,}" + (f" ({100 * result.wrong / result.requests:.2f} %)" if result.wrong else ""),
        f"{result.calls_per_1000:.1f}",
        f"{result.scripts / (60 * world.minutes):,.1f}",
        f"{result.recalls / thousands:.1f}",
        f"{100 * (1 - result.asked / max(1, result.requests)):.1f} %",
        f"{100 * result.degraded / max(1, result.requests):.1f} %",
        "; ".join(result.broken) or "kept",
    )


def _over(worst: Worst, kind: str) -> str:
    over = getattr(worst, kind)
    return "" if over is None else f"{over:+,}"


def plot(results: Sequence[Result]) -> str:
    """Per run what the window that ends at each second held, beside the limit and the bound."""
    panels = [_panel(result, at) for at, result in enumerate(results)]
    width = PANEL_WIDTH * min(COLUMNS, max(1, len(panels)))
    height = PANEL_HEIGHT * math.ceil(len(panels) / COLUMNS)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="9">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(result: Result, at: int) -> str:
    world = result.world
    end = max(1.0, result.curve[-1][0])
    bound = world.limit
    if world.redis_down == "safe" and result.away:
        bound += (world.workers - 1) * max(1, world.limit // world.workers)
    top = 1.08 * max(bound, *(count for _, count in result.curve))

    def x(seconds: float) -> float:
        return round(PLOT_LEFT + PLOT_WIDTH * min(seconds, end) / end, 1)

    def y(count: float) -> float:
        return round(PLOT_TOP + PLOT_HEIGHT * (1 - count / top), 1)

    def level(count: int, colour: str) -> str:
        return (
            f'<path d="M{x(0)} {y(count)}H{x(end)}" stroke="{colour}" stroke-dasharray="4 2"/>'
            f'<text x="{PLOT_LEFT - 3}" y="{y(count) + 3}" text-anchor="end" fill="{colour}">{count:,}</text>'
        )

    parts = [
        f'<g transform="translate({PANEL_WIDTH * (at % COLUMNS)} {PANEL_HEIGHT * (at // COLUMNS)})" fill="none">',
        f'<text x="{PLOT_LEFT}" y="14" fill="{INK}" font-weight="bold">{world.title} ({world.redis_down})</text>',
    ]
    for begin, until in result.away:
        wide = round(max(0.5, x(until) - x(begin)), 1)
        parts.append(
            f'<rect x="{x(begin)}" y="{PLOT_TOP}" width="{wide}" height="{PLOT_HEIGHT}" fill="{AWAY}"/>'
        )
    parts += [
        f'<path d="M{x(minute * 60)} {PLOT_TOP}v{PLOT_HEIGHT}" stroke="{GRID}"/>'
        for minute in range(int(end // 60) + 1)
    ]
    said = f"{result.calls_per_1000:.1f} calls per 1,000, {result.admitted_percent:.1f} %"
    below = PLOT_TOP + PLOT_HEIGHT + 12
    steps = "".join(
        f"{'L' if step else 'M'}{x(seconds)} {y(count)}" for step, (seconds, count) in enumerate(result.curve)
    )
    parts += [
        f'<path d="{steps}" stroke="{LINE}"/>',
        level(world.limit, LIMIT),
        level(bound, BOUND) if bound > world.limit else "",
        f'<text x="{PLOT_LEFT}" y="{below}" fill="{INK}">last 60 s, by minutes; {said}</text>',
        "</g>",
    ]
    return "\n".join(part for part in parts if part)
