"""Callers who hang up while their answer is being made."""

import json
import socket
import struct
import time

from tests.integration.conftest import Caller
from tests.support.servers import GatewayProcess


def hang_up(door: GatewayProcess, number: int) -> None:
    """Ask for something that takes a PBKDF2, 0.2 s and more, and be gone (RST) while it runs."""
    body = json.dumps({"email": f"gone{number}@example.org", "password": "correct horse battery"}).encode()
    with socket.create_connection(("127.0.0.1", door.port)) as connection:
        connection.sendall(
            b"POST /api/v1/users HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def records_of_those_who_left(door: GatewayProcess) -> list[str]:
    return [line for line in door.log.splitlines() if " 499 " in line or "status=499" in line]


def test_a_caller_who_hangs_up_is_a_record_and_no_error(door: GatewayProcess, caller: Caller) -> None:
    number = 0
    # The log is written twice a second.
    while len(records_of_those_who_left(door)) < 3 and number < 30:
        hang_up(door, number)
        number += 1
        time.sleep(0.6)
    assert len(records_of_those_who_left(door)) >= 3, door.log
    # The fixture looks for tracebacks, too.
    assert "a handler failed" not in door.log
    assert "ERROR" not in door.log
    assert caller.get("/api/v1/users/me").status_code == 200
