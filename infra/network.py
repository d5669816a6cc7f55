"""Loopback ports for servers we start ourselves."""

import socket

LOOPBACK = "127.0.0.1"


def free_port(preferred: int | None = None) -> int:
    """The preferred port if nothing listens there, otherwise one the system picks.

    Between this answer and its use somebody else may take the port; the system hands out ephemeral ports in turn, so
    that two starts at the same time don't get the same one.
    """
    if preferred is not None and is_free(preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def claim(port: int) -> socket.socket | None:
    """The right to try a port, among processes that ask for it here: two starts at once would both find it free.

    It is held as the UDP port of the same number, which nobody wants, and ends with the socket or the process.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        holder.bind((LOOPBACK, port))
    except OSError:
        holder.close()
        return None
    return holder


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A port in TIME_WAIT is free for a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
