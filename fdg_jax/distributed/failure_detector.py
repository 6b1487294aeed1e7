"""Failure detection: each process holds a connection to process 0, which breaks when it ends.

When a process ends, the kernel closes its connections immediately. The loss of a whole machine is
detected by unanswered keepalive probes. JAX's service (0.10.2) reports a lost process by missing
heartbeats: after 18 s with a timeout of 20 s; with a timeout of 2 s, a process stopped for 4 s ends
the run. If process 0 is lost, it aborts the others without naming it, and it does not name
processes that never joined. `live_devices` depends on the same heartbeats, and an exit status is
only visible on the same machine.

The protocol has one line per message: "bye N", "failed N" or, from process 0 to the others,
"lost N" and "silent N".
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

# The exit status of a process that ends because another one did: EX_UNAVAILABLE of sysexits.h.
LOST = 69
LINE = 1024  # bytes; longer lines are not of this protocol
# TCP keepalive: seconds before the first probe, seconds between probes, number of lost probes. The
# total is less than JAX's timeout, whose error does not name the process.
PROBES = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
# Seconds that other processes have for their own errors after one announced a failure.
GRACE = 0.5

# The detector of this process, once it has joined a run.
current: FailureDetector | None = None


class FailureDetector:
    """The connections of one process: to process 0, or from process 0 to all others.

    Args:
      own: number of this process.
      count: number of processes.
      links: connections by number of the other process, after the rendezvous.
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
        except ConnectionError:  # it ended before receiving everything
            pass
        except OSError:  # keepalive probes unanswered
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
        # One write, immediately: if process 0 is lost, JAX is about to abort this process.
        text = f"error: process {number} of {self._count} {how} (this is process {self._own})\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(LOST)

    def apart(self) -> bool:
        """Whether a connected process is on another machine."""
        return any(map(_far, self._links.values()))

    def leave(self, failed: bool) -> None:
        """Announces that this process is about to end; later calls have no effect.

        Args:
          failed: whether the others must end, too.
        """
        if not self._leaving:
            self._leaving = True
            tell(self._links, f"{'failed' if failed else 'bye'} {self._own}")

    def _exit(self) -> None:
        # Set by the interpreter if an exception ended the program.
        self.leave(failed=hasattr(sys, "last_value"))


def _far(link: socket.socket) -> bool:
    try:
        theirs = link.getpeername()[0]
    except OSError:  # it has ended already; its thread reports that
        return False
    return theirs != link.getsockname()[0] and not ipaddress.ip_address(theirs).is_loopback


def _probe(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not on every system; default values are hours
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # There are no keepalive probes while sent data is unacknowledged.
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
    """Reads the next line byte by byte, nothing beyond it; "" at the end of the stream."""
    begin, line = time.monotonic(), b""
    while not line.endswith(b"\n"):
        if seconds is not None:
            link.settimeout(max(begin + seconds - time.monotonic(), 1e-3))
        byte = link.recv(1)
        if not byte or len(line) > LINE:
            return ""
        line += byte
    return line.decode(errors="replace").rstrip("\n")
