"""How a log writes times and flags: what making shards and reading requests must agree on."""

from datetime import UTC, datetime

TRUE_TEXTS = ("true", "1", "1.0", "yes", "y", "t")
FALSE_TEXTS = ("false", "0", "0.0", "no", "n", "f")
MICROSECONDS = {"s": 1_000_000, "ms": 1000, "us": 1}
UNIT_LIMITS = ((1e11, "s"), (1e14, "ms"), (1e17, "us"))  # seconds below 1e11 reach to the year 5138
MAX_TIME_US = 253402300799 * 1_000_000  # the end of the year 9999


def parse_time(text: str) -> int | None:
    """Microseconds since 1970 of an ISO 8601 text (UTC when it names no zone); None when it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    span = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (span.days * 86400 + span.seconds) * 1_000_000 + span.microseconds
