"""What Linux tells about processes and cores: trees, CPU time, listening sockets, memory. Only reads."""

import os
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def parse_stat(text: str) -> tuple[int, int]:
    """Parent's pid and CPU ticks (user + system) from a `/proc/<pid>/stat` line (proc(5))."""
    # The command's name may hold spaces and parentheses, so count from the last one.
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[1]), int(fields[11]) + int(fields[12])


def parse_core_ticks(text: str, core: int) -> int:
    """Busy ticks of one core from `/proc/stat`: all but idle, iowait, steal, guest (part of user)."""
    for line in text.splitlines():
        name, *columns = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq = map(int, columns[:7])
            return user + nice + system + irq + softirq
    raise ValueError(f"no core {core}")


def parse_listeners(text: str, port: int) -> set[str]:
    """Inodes of the sockets that listen on a port, from `/proc/net/tcp` or `tcp6` (state 0A)."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {row[9] for row in rows if row[3] == "0A" and int(row[1].rsplit(":", 1)[1], 16) == port}


def tree(root: int) -> list[int]:
    """A living process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent, _ = parse_stat((entry / "stat").read_text())
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds, user and system, that these processes used so far; one that is gone counts nothing."""
    ticks = 0
    for pid in pids:
        try:
            ticks += parse_stat(Path(f"/proc/{pid}/stat").read_text())[1]
        except OSError:
            continue
    return ticks / TICKS_PER_S


def core_busy_s(core: int) -> float:
    return parse_core_ticks(Path("/proc/stat").read_text(), core) / TICKS_PER_S


def owns_port(pids: Iterable[int], port: int) -> bool:
    """Whether these processes hold the socket that listens on the port, and nobody else does."""
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    listeners = set[str]().union(
        *(parse_listeners(table.read_text(), port) for table in tables if table.exists())
    )
    held = set()
    for pid in pids:
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        held |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    return bool(listeners) and listeners <= held


def memory_kb(pid: int) -> dict[str, int]:
    """`rss` and `pss` in KB, from `/proc/<pid>/smaps_rollup`; pss shares out what several processes map."""
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {row[0].rstrip(":").lower(): int(row[1]) for row in rows if row[0] in ("Rss:", "Pss:")}
