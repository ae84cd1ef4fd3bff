"""Log lines: JSON for machines, plain text for people. One line per event, never a traceback without its event."""

import datetime as dt
import logging
import sys

import msgspec

from lucid.settings import ServerSettings


class JsonFormatter(logging.Formatter):
    """One JSON object per line. A record's `audit` mapping becomes its fields."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder = msgspec.json.Encoder(enc_hook=str)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "audit", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return self._encoder.encode(line).decode()


class TextFormatter(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        audit = getattr(record, "audit", {})
        fields = "".join(f" {name}={value}" for name, value in audit.items() if value and name != "event")
        text = f"{_time_of(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up(settings: ServerSettings) -> None:
    """Send all loggers of this process to standard error. Called once per worker."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if settings.log_format == "text" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # Drivers tell of every retry; what they mean for the gateway is said once, by its own health monitor.
    for name in ("pymongo", "motor", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("sanic").setLevel(max(logging.WARNING, root.level))


def _time_of(record: logging.LogRecord) -> str:
    return dt.datetime.fromtimestamp(record.created, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
