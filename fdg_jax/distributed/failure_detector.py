"""Which processes of a run live: each holds a connection to process 0, and its end breaks it.

JAX's own service tells of a lost process when its heartbeats stay away, and where process 0 is lost
aborts the others without its number. The kernel tells at once: it closes what the dead had open. Of
a machine that is lost whole, it tells when nothing answers its probes.

What travels, a line each: "hello OWN COUNT" to process 0; "here" from it when all have come, or
"no REASON"; later "bye N", "failed N" or, from process 0 to the others, "lost N", "silent N".
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
import warnings

# The exit status of a process that ends because another has: EX_UNAVAILABLE of sysexits.h.
LOST = 69
LINE = 1024  # bytes; longer ones are nobody's
CONNECT_SECONDS = 5.0  # one attempt
HELLO_SECONDS = 2.0
POLL_SECONDS = 0.1
SILENT_SECONDS = 5.0
# Of a silent connection, in seconds: the first probe, those after it, and how many may be lost;
# together less than JAX takes, which would not say who.
PROBES = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
# A process that failed has told the others; they may have something to say of their own first.
GRACE = 0.5

# Of this process, once it has joined a run.
current: FailureDetector | None = None


class FailureDetector:
    """The connections of one process: its own to process 0, or process 0's to all others.

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
        """Hears what the process at the other end says; ends this one when that one is lost."""
        word = "lost"
        try:
            while said := re.fullmatch(r"(bye|failed|lost|silent) (\d+)", _line(link)):
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
            _tell(self._links, f"{word} {number}")
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
        """Whether a process at the other end of a connection is on another machine."""
        return any(map(_far, self._links.values()))

    def leave(self, failed: bool) -> None:
        """Tells the others that this process is about to end; later calls say nothing.

        Args:
          failed: whether they have to end too.
        """
        if not self._leaving:
            self._leaving = True
            _tell(self._links, f"{'failed' if failed else 'bye'} {self._own}")

    def _exit(self) -> None:
        # The interpreter keeps here the exception that ended the program.
        self.leave(failed=hasattr(sys, "last_value"))


def roll_call(
    own: int, count: int, coordinator: str, seconds: float
) -> tuple[FailureDetector, str]:
    """Waits until all processes have come; every process calls this.

    Args:
      own: number of this process.
      count: how many there are.
      coordinator: "host:port" where process 0 listens until all have come, and no longer.
      seconds: how long they may take.

    Returns:
      What ends this process when another is lost, and this machine's address as the others see it.

    Raises:
      ValueError: not all came, and the message says who did not; the port is taken; nobody
        answers there; two processes have one number, or different counts.
    """
    host, port = address(coordinator)
    patience = _Patience(seconds)
    if own:
        link = _come(f"hello {own} {count}\n", coordinator, (host, port), patience)
        return FailureDetector(own, count, {0: link}), str(link.getsockname()[0])
    links: dict[int, socket.socket] = {}
    try:
        with _listen(coordinator, port) as server:
            while missing := [i for i in range(1, count) if i not in links]:
                if gone := [i for i, link in links.items() if _closed(link)]:
                    raise ValueError(
                        f"coordinator={coordinator}: process {gone[0]} of {count} ended before all "
                        "had come; its own lines say why"
                    )
                who = f"process {', '.join(map(str, missing))} of {count}"
                if patience.over(who):
                    raise ValueError(
                        f"coordinator={coordinator}: {who} did not come within {seconds:g} s; "
                        "start all together, with the same coordinator"
                    )
                with contextlib.suppress(OSError):
                    _admit(server.accept()[0], count, links)
    except ValueError as error:
        _tell(links, f"no {error}")
        for link in links.values():
            link.close()
        raise
    _tell(links, "here")
    return FailureDetector(own, count, links), host


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of "host:port"."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator={coordinator}: give host:port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def _listen(coordinator: str, port: int) -> socket.socket:
    try:
        # JAX would share the port with another program, or wait.
        server = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        raise ValueError(
            f"coordinator={coordinator}: process 0 cannot listen there "
            f"({os.strerror(error.errno or 0)}); choose another port"
        ) from error
    server.settimeout(POLL_SECONDS)
    return server


def _admit(link: socket.socket, count: int, links: dict[int, socket.socket]) -> None:
    """Adds one who has come, if it is one of ours."""
    link.settimeout(HELLO_SECONDS)
    said = None
    with contextlib.suppress(OSError):
        said = re.fullmatch(r"hello (\d{1,9}) (\d{1,9})", _line(link))
    if said is None:
        link.close()
        return
    link.settimeout(None)
    number, theirs = int(said[1]), int(said[2])
    wrong = None
    if theirs != count:
        wrong = f"num_processes={count} in process 0, {theirs} in process {number}; give all one"
    elif number in links or not 0 < number < count:
        wrong = f"process_id={number}: two processes have it; give each its own"
    if wrong:
        _tell({number: link}, f"no {wrong}")
        link.close()
        raise ValueError(wrong)
    links[number] = link


def _come(
    hello: str, coordinator: str, place: tuple[str, int], patience: _Patience
) -> socket.socket:
    """Connects to process 0, and waits until it says that all are here."""
    while True:
        try:
            link = socket.create_connection(place, timeout=min(patience.seconds, CONNECT_SECONDS))
            if link.getsockname() != link.getpeername():
                break
            # Where nobody listens on this machine's port, a connection can be to itself.
            link.close()
        except OSError as error:
            if patience.over(f"process 0 at {coordinator}"):
                raise ValueError(
                    f"coordinator={coordinator}: process 0 does not answer there within "
                    f"{patience.seconds:g} s ({error.strerror or error}); start it, or mend "
                    "the address"
                ) from error
            time.sleep(POLL_SECONDS)
    # Process 0 began to wait at another time, and is the one to say who is missing.
    link.settimeout(patience.seconds + HELLO_SECONDS)
    line = ""
    with contextlib.suppress(OSError):
        link.sendall(hello.encode())
        line = _line(link)
    if line == "here":
        link.settimeout(None)
        return link
    link.close()
    raise ValueError(
        line.removeprefix("no ")
        if line.startswith("no ")
        else f"coordinator={coordinator}: process 0 ended before all had come, or what answers "
        "there is another program; see the lines of process 0"
    )


class _Patience:
    """How long to wait, and a word to who sits before the screen when it has been a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()
        self._said = False

    def over(self, who: str) -> bool:
        gone = time.monotonic() - self._begin
        if gone > SILENT_SECONDS and not self._said:
            self._said = True
            warnings.warn(f"waiting for {who}, up to {self.seconds:g} s", stacklevel=3)
        return gone > self.seconds


def _closed(link: socket.socket) -> bool:
    try:
        return not link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


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


def _tell(links: dict[int, socket.socket], line: str) -> None:
    for link in links.values():
        with contextlib.suppress(OSError):
            link.sendall(f"{line}\n".encode())


def _line(link: socket.socket) -> str:
    """The next line; byte by byte, so that nothing after it is taken. Empty at the end."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte or len(line) > LINE:
            return ""
        line += byte
    return line.decode(errors="replace").rstrip("\n")
