"""Failure detection: each process holds a connection to process 0, which breaks when it ends.

The kernel tells at once: it closes what the dead had open. Of a machine that is lost whole, it
tells when nothing answers its probes. JAX's service (0.10.2) tells of a lost process when its
heartbeats stay away, 18 s later where it waits for 20; where it waits for 2, a process that was
stopped for 4 s ends the run. Where process 0 is lost it aborts the others without its number, and
it does not say who did not come. `live_devices` waits for the same heartbeats, and an exit status
is seen on its own machine alone.

What travels, a line each: "bye N", "failed N" or, from process 0 to the others, "lost N" and
"silent N".
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import os
import re
import socket
import sys
import threading
import time

# The exit status of a process that ends because another has: EX_UNAVAILABLE of sysexits.h.
LOST = 69
LINE = 1024  # bytes; longer ones are nobody's
# Of a silent connection, in seconds: the first probe, those after it, and how many may be lost;
# together less than JAX takes, which would not say who.
PROBES = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
# A process that failed has told the others; they may have something to say of their own first.
GRACE = 0.5

# Of this process, once it has joined a run.
current: FailureDetector | None = None


class FailureDetector:
    """The connections of one process: to process 0, or from process 0 to all others.

    Args:
      own: number of this process.
      count: how many there are.
      links: by number of the process at the other end; all have said that they are here.
    """

    def __init__(self, own: int, count: int, links: dict[int, socket.socket]) -> None:
        self._own = own
        self._count = count
        self._links = links
        self._leaving = False
        for number, link in links.items():
            _probe(link)
            threading.Thread(target=self._follow, args=(number, link), daemon=True).start()
        atexit.register(self._exit)

    def _follow(self, number: int, link: socket.socket) -> None:
        """Reads messages of the other process; ends this one when the other is lost."""
        word = "lost"
        try:
            while said := re.fullmatch(r"(bye|failed|lost|silent) (\d+)", read_line(link)):
                if said[1] == "bye":
                    return
                self._end(said[1], int(said[2]))
        except ConnectionError:  # it ended before it took all that was sent
            pass
        except OSError:  # the probes
            word = "silent"
        self._end(word, number)

    def _end(self, word: str, number: int) -> None:
        if self._leaving:
            return
        if self._own == 0:
            tell(self._links, f"{word} {number}")
        if word == "failed":
            time.sleep(GRACE)
            if self._leaving:
                return
            how = "failed; its own lines say why"
        elif word == "lost":
            how = "ended without a word: it was killed, or crashed"
        else:
            how = "does not answer: its machine stopped, or the network broke"
        # In one piece, and at once: where process 0 is lost, JAX is about to abort this one.
        text = f"error: process {number} of {self._count} {how} (this is process {self._own})\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(LOST)

    def apart(self) -> bool:
        """Whether the process at the other end is on another machine."""
        return any(map(_far, self._links.values()))

    def leave(self, failed: bool) -> None:
        """Announces that this process is about to end; later calls have no effect.

        Args:
          failed: whether they have to end too.
        """
        if not self._leaving:
            self._leaving = True
            tell(self._links, f"{'failed' if failed else 'bye'} {self._own}")

    def _exit(self) -> None:
        # The interpreter keeps here the exception that ended the program.
        self.leave(failed=hasattr(sys, "last_value"))


def _far(link: socket.socket) -> bool:
    try:
        theirs = link.getpeername()[0]
    except OSError:  # it has ended already; the thread that follows it says so
        return False
    return theirs != link.getsockname()[0] and not ipaddress.ip_address(theirs).is_loopback


def _probe(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not on every system, whose own values are hours
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Nothing is probed while a line waits to be acknowledged.
        idle, interval, lost = PROBES.values()
        link.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (idle + interval * lost)
        )


def tell(links: dict[int, socket.socket], line: str) -> None:
    """Sends a line to all connected processes."""
    for link in links.values():
        with contextlib.suppress(OSError):
            link.sendall(f"{line}\n".encode())


def read_line(link: socket.socket, seconds: float | None = None) -> str:
    """Reads the next line byte by byte, consuming nothing after it. Empty at the end."""
    begin, line = time.monotonic(), b""
    while not line.endswith(b"\n"):
        if seconds is not None:
            link.settimeout(max(begin + seconds - time.monotonic(), 1e-3))
        byte = link.recv(1)
        if not byte or len(line) > LINE:
            return ""
        line += byte
    return line.decode(errors="replace").rstrip("\n")
