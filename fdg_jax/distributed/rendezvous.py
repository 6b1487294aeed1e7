"""Rendezvous: all processes connect to process 0, which reports the missing ones.

It listens only at the coordinator's address, not on the machine's other networks. The protocol has
one line per message: "challenge NONCE" from process 0, "hello OWN COUNT PROOF" to it, and "here"
when all are connected, or "no REASON". The proof is an HMAC of nonce, number and count with the
run's token, which is never sent. Without a token the key is empty, and the proof proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import queue
import re
import secrets
import socket
import threading
import time
import warnings

from fdg_jax.distributed.failure_detector import FailureDetector, read_line, tell

# Environment variables: the run's token, and the bind address of JAX's service and process 0.
TOKEN, BIND = "FDG_RUN_TOKEN", "JAX_COORDINATOR_BIND_ADDRESS"
CONNECT_SECONDS = 5.0  # per attempt
HELLO_SECONDS = 2.0
POLL_SECONDS = 0.1
SILENT_SECONDS = 5.0


def roll_call(
    own: int, count: int, coordinator: str, seconds: float, bind: str | None = None
) -> tuple[FailureDetector, str]:
    """Waits until all processes have connected; every process must call it.

    Args:
      own: number of this process.
      count: number of processes.
      coordinator: "host:port" where process 0 listens until all are connected.
      seconds: the time limit.
      bind: "host:port" where process 0 listens instead, if connections arrive at another address.

    Returns:
      The failure detector, and this machine's address as seen by the others.

    Raises:
      ValueError: processes are missing (the message names them); the port is in use or does not
        answer; two processes have the same number, or different counts or tokens. Process 0 only
        warns of other tokens.
    """
    host, port = address(coordinator)
    patience = _Patience(seconds)
    if own:
        link = _come(f"{own} {count}", coordinator, (host, port), patience)
        return FailureDetector(own, count, {0: link}), str(link.getsockname()[0])
    links: dict[int, socket.socket] = {}
    came: queue.SimpleQueue[tuple[socket.socket, str, re.Match[str]]] = queue.SimpleQueue()
    try:
        name, value = (BIND, bind) if bind else ("coordinator", coordinator)
        with _listen(name, value, patience) as server:
            place = server.getsockname()[0]
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
                        f"start all together, with the same coordinator (here it is {place})"
                    )
                with contextlib.suppress(OSError):
                    link = server.accept()[0]
                    # One thread each, so that a slow process does not block the others.
                    threading.Thread(target=_hear, args=(link, came), daemon=True).start()
                while not came.empty():
                    _admit(*came.get(), coordinator, count, links)
    except ValueError as error:
        tell(links, f"no {error}")
        for link in links.values():
            link.close()
        raise
    tell(links, "here")
    return FailureDetector(own, count, links), host


def address(value: str, name: str = "coordinator") -> tuple[str, int]:
    """Host and port of "host:port"; ``name`` is the name of the argument."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{name}={value}: give host:port, such as 10.0.0.1:1234")
    return host.strip("[]"), int(port)


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """The addresses of a host, each with its family; IPv4 first."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted(((one[0], one[4]) for one in found), key=lambda f: f[0] != socket.AF_INET)


def _listen(name: str, value: str, patience: _Patience) -> socket.socket:
    host, port = address(value, name)
    while True:
        try:
            found = addresses(host, port)
            break
        except socket.gaierror as error:  # Kubernetes publishes a pod's name once it runs
            if patience.over(f"an address of {host}"):
                raise ValueError(
                    f"{name}={value}: process 0 finds no address of {host} ({error.strerror}); "
                    "mend the name, or give an address"
                ) from error
            time.sleep(POLL_SECONDS)
    why = None
    for family, at in found:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        try:
            # Without this check, JAX would share the port with another program, or wait.
            server = socket.create_server(at, family=family, reuse_port=False, dualstack_ipv6=both)
        except OSError as error:
            why = error
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            raise ValueError(
                f"{name}={value}: process 0 cannot listen there "
                f"({os.strerror(error.errno or 0)}); choose another port"
            ) from error
        server.settimeout(POLL_SECONDS)
        return server
    raise ValueError(
        f"{name}={value}: {found[0][1][0]} is no address of process 0's machine; give one that is, "
        f"or set {BIND}=host:port in process 0 to where connections arrive"
    ) from why


def _hear(link: socket.socket, came: queue.SimpleQueue) -> None:
    """Queues a connection if it speaks the protocol."""
    challenge, said = secrets.token_hex(16), None
    with contextlib.suppress(OSError):
        tell({0: link}, f"challenge {challenge}")
        hello = r"hello (\d{1,9}) (\d{1,9}) ([0-9a-f]{64})"
        said = re.fullmatch(hello, read_line(link, HELLO_SECONDS))
    if said is None:
        link.close()
    else:
        came.put((link, challenge, said))


def _proof(claim: str) -> str:
    token = os.fsencode(os.environ.get(TOKEN, ""))
    return hmac.new(token, claim.encode(), "sha256").hexdigest()


def _admit(
    link: socket.socket,
    challenge: str,
    said: re.Match[str],
    coordinator: str,
    count: int,
    links: dict[int, socket.socket],
) -> None:
    """Adds a connection if it belongs to the run."""
    link.settimeout(None)
    number, theirs = int(said[1]), int(said[2])
    ours = hmac.compare_digest(said[3], _proof(f"{challenge} {said[1]} {said[2]}"))
    wrong = None
    if not ours:
        wrong = (
            f"coordinator={coordinator}: process {number} has another {TOKEN} than process 0, or "
            "one of them has none; set the same in all processes"
        )
    elif theirs != count:
        wrong = f"num_processes={count} in process 0, {theirs} in process {number}; give all one"
    elif number in links or not 0 < number < count:
        wrong = f"process_id={number}: two processes have it; give each its own"
    if wrong is None:
        links[number] = link
        return
    tell({number: link}, f"no {wrong}")
    link.close()
    if ours:
        raise ValueError(wrong)
    # A stranger must not end the run.
    warnings.warn(f"{TOKEN}: one that came has another, and is refused", stacklevel=3)


def _come(
    claim: str, coordinator: str, place: tuple[str, int], patience: _Patience
) -> socket.socket:
    """Connects to process 0 and waits until all processes are present."""
    while True:
        try:
            link = socket.create_connection(place, timeout=min(patience.seconds, CONNECT_SECONDS))
            if link.getsockname() != link.getpeername():
                break
            # If nobody listens on a local port, a socket can connect to itself.
            link.close()
        except OSError as error:
            if patience.over(f"process 0 at {coordinator}"):
                raise ValueError(
                    f"coordinator={coordinator}: process 0 does not answer there within "
                    f"{patience.seconds:g} s ({error.strerror or error}); start it, or mend "
                    "the address"
                ) from error
            time.sleep(POLL_SECONDS)
    # Process 0 may have started to wait later, and its error names the missing processes.
    link.settimeout(patience.seconds + HELLO_SECONDS)
    line = ""
    with contextlib.suppress(OSError):
        line = read_line(link)
        if challenge := re.fullmatch(r"challenge ([0-9a-f]{32})", line):
            tell({0: link}, f"hello {claim} {_proof(f'{challenge[1]} {claim}')}")
            line = read_line(link)
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
    """A deadline that warns after a while about what it waits for."""

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
