"""Processes find one another, or say who is missing; the end of one ends the others, by name."""

import contextlib
import importlib
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from fdg_jax import distributed
from fdg_jax.distributed import failure_detector, rendezvous
from tests import processes

# The function of this name hides it.
initialize = importlib.import_module("fdg_jax.distributed.initialize")


def call(count: int, *calls: tuple[int, int], seconds: float) -> list[str]:
    """What processes hear that say to be one of so many, where 0 believes in ``count``."""
    coordinator = f"127.0.0.1:{distributed.free_port()}"
    heard = ["here"] * (1 + len(calls))

    def one(place: int, own: int, count: int) -> None:
        try:
            rendezvous.roll_call(own, count, coordinator, seconds)
        except ValueError as error:
            heard[place] = str(error)

    threads = [
        threading.Thread(target=one, args=(place, *who))
        for place, who in enumerate([(0, count), *calls])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return heard


def test_who_is_missing_is_said_by_all_who_came():
    heard = call(4, (2, 4), seconds=0.5)
    assert heard[0] == heard[1]
    assert "process 1, 3 of 4 did not come within 0.5 s; start all together" in heard[0]


def test_one_number_twice_and_different_counts_are_refused():
    heard = call(3, (1, 3), (1, 3), seconds=20)
    assert heard == ["process_id=1: two processes have it; give each its own"] * 3
    heard = call(2, (1, 3), seconds=20)
    assert heard == ["num_processes=2 in process 0, 3 in process 1; give all one"] * 2


def connect(port: int) -> socket.socket:
    """To a process 0 that may not have begun to listen."""
    end = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def answer(link: socket.socket, claim: str, token: str) -> None:
    """Says to be "OWN COUNT" of the run with this token, as its processes do."""
    word, challenge = failure_detector.read_line(link).split()
    assert word == "challenge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(rendezvous.TOKEN, token)
        proof = rendezvous._proof(f"{challenge} {claim}")
    link.sendall(f"hello {claim} {proof}\n".encode())


def test_a_stranger_is_not_counted(monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 0.2)
    port = distributed.free_port()
    heard = []

    def zero() -> None:
        with pytest.raises(ValueError, match="process 1 of 2 did not come") as caught:
            rendezvous.roll_call(0, 2, f"127.0.0.1:{port}", 1.5)
        heard.append(caught)

    thread = threading.Thread(target=zero)
    thread.start()
    time.sleep(0.3)
    with (
        socket.create_connection(("127.0.0.1", port)) as silent,
        socket.create_connection(("127.0.0.1", port)) as loud,
    ):
        loud.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100)
        thread.join(60)
        silent.close()
    assert len(heard) == 1


def test_what_answers_may_be_another_program():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            link, _ = server.accept()
            link.sendall(b"220 mail.example.org\n")
            link.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ValueError, match="what answers there is another program"):
            rendezvous.roll_call(1, 2, f"127.0.0.1:{server.getsockname()[1]}", 5)
        thread.join()


def test_one_that_came_and_ended_is_named_before_the_others_have_come():
    port = distributed.free_port()

    def come_and_go() -> None:
        with connect(port) as link:
            answer(link, "1 3", "")
            time.sleep(0.3)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with pytest.raises(ValueError, match="process 1 of 3 ended before all had come"):
        rendezvous.roll_call(0, 3, f"127.0.0.1:{port}", 60)
    thread.join()


TOKEN = "a secret"


def living(own: int, port: int, deed: str = "stay") -> list[str]:
    return ["tests.distributed.living", str(own), "2", f"127.0.0.1:{port}", deed]


def wait_for(text: str, path: pathlib.Path) -> None:
    end = time.monotonic() + processes.SECONDS
    while text not in path.read_text():
        assert time.monotonic() < end, path.read_text()
        time.sleep(0.02)


def test_who_does_not_know_the_token_neither_joins_nor_ends_the_run():
    port = distributed.free_port()
    with processes.started([living(0, port)], FDG_RUN_TOKEN=TOKEN) as [(zero, path)]:
        # One that is to be counted, one that would be refused by all, one without a proof.
        for claim in ("1 2", "1 3", "0 2"):
            with connect(port) as link:
                answer(link, claim, "a guess")
                assert failure_detector.read_line(link) == (
                    f"no coordinator=127.0.0.1:{port}: process {claim[0]} has another "
                    "FDG_RUN_TOKEN than process 0, or one of them has none; set the same in all "
                    "processes"
                )
                assert not link.recv(1)
        with connect(port) as link:
            assert failure_detector.read_line(link).startswith("challenge ")
            link.sendall(b"hello 1 2\n")
            assert not link.recv(1)
        # A process of the run that has none, and one that has it while a stranger says little.
        with processes.started([living(1, port)]) as [(one, words)]:
            assert one.wait(timeout=processes.SECONDS) == 1
            assert len(words.read_text().splitlines()) == 1
            assert "another FDG_RUN_TOKEN than process 0" in words.read_text()
        assert zero.poll() is None
        with connect(port), processes.started([living(1, port)], FDG_RUN_TOKEN=TOKEN) as [(_, one)]:
            wait_for("here", one)
            wait_for("here", path)
        assert path.read_text().count("one that came has another, and is refused") == 1


def test_a_proof_is_of_no_use_for_another_connection(monkeypatch):
    monkeypatch.setenv(rendezvous.TOKEN, TOKEN)
    port = distributed.free_port()
    with processes.started([living(0, port)]), connect(port) as link, connect(port) as other:
        _, challenge = failure_detector.read_line(link).split()
        failure_detector.read_line(other)
        other.sendall(f"hello 1 2 {rendezvous._proof(f'{challenge} 1 2')}\n".encode())
        assert "another FDG_RUN_TOKEN" in failure_detector.read_line(other)


def own_addresses() -> list[str]:
    """Addresses of this machine, other than 127.0.0.1, at which one can listen and connect."""
    found = ["127.0.0.2"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 1))  # sends nothing
        found.append(probe.getsockname()[0])
    return found


def test_process_0_listens_at_the_address_of_the_coordinator_alone(monkeypatch):
    monkeypatch.delenv(rendezvous.BIND, raising=False)
    listening = rendezvous._Patience(1)
    for address in own_addresses():
        port = distributed.free_port()
        with rendezvous._listen("coordinator", f"127.0.0.1:{port}", listening):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=5)
    with rendezvous._listen("coordinator", f"localhost:{port}", listening) as server:
        assert server.getsockname()[0] in ("127.0.0.1", "::1")


def test_over_ipv6():
    try:
        port = distributed.free_port("::1")
    except OSError:
        pytest.skip("wants IPv6")
    with rendezvous._listen("coordinator", f"[::1]:{port}", rendezvous._Patience(1)) as server:
        assert server.getsockname()[0] == "::1"
        socket.create_connection(("::1", port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(
    ("coordinator", "bind", "complaint"),
    [
        (
            "203.0.113.7:1234",  # of the block that is kept for documents
            None,
            "coordinator=203.0.113.7:1234: 203.0.113.7 is no address of process 0's machine; give "
            "one that is, or set JAX_COORDINATOR_BIND_ADDRESS=host:port in process 0 to where "
            "connections arrive",
        ),
        ("203.0.113.7:1234", "7", "JAX_COORDINATOR_BIND_ADDRESS=7: give host:port"),
        (
            "203.0.113.7:1234",
            "127.0.0.1:0",
            "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:0: give host:port",
        ),
        ("no.such.invalid:1234", None, "process 0 finds no address of no.such.invalid ("),
    ],
)
def test_where_process_0_cannot_listen_is_said_with_the_remedy(coordinator, bind, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        rendezvous.roll_call(0, 2, coordinator, 0.1, bind)


def test_process_0_listens_where_connections_arrive():
    bind = f"127.0.0.1:{distributed.free_port()}"
    with pytest.raises(ValueError, match=r"did not come .*\(here it is 127\.0\.0\.1\)"):
        rendezvous.roll_call(0, 2, "203.0.113.7:1234", 0.1, bind)


def test_a_machine_whose_name_stands_for_itself_alone_is_found_by_its_other_address(monkeypatch):
    known = {"a": "127.0.1.1", "b": "127.0.0.1", "c": "10.0.0.3"}

    def look_up(host: str, port: int) -> list:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, (known[host], port))]

    monkeypatch.setattr(rendezvous, "addresses", look_up)
    assert initialize._facing(["c", "a"]) == "10.0.0.3"
    assert initialize._facing(["a", "a"]) == "127.0.1.1"
    assert initialize._facing(["a", "a", "b"]) == "127.0.0.1"  # as b sees it
    assert initialize._facing(["unknown", "unknown too"]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("number", "deed", "why"),
    [
        (1, "kill", "ended without a word: it was killed, or crashed"),
        (0, "kill", "ended without a word: it was killed, or crashed"),
        (1, "fail", "failed; its own lines say why"),
        (0, "quit", "failed; its own lines say why"),
        (2, "leave", None),
    ],
)
def test_the_end_of_one_ends_all_others_by_name(number, deed, why):
    coordinator = f"127.0.0.1:{distributed.free_port()}"
    deeds = [deed if i == number and deed != "kill" else "stay" for i in range(3)]
    commands = [["tests.distributed.living", str(i), "3", coordinator, deeds[i]] for i in range(3)]
    with processes.started(commands) as found:
        for _, path in found:
            wait_for("here", path)
        if deed == "kill":
            found[number][0].kill()
        begin = time.monotonic()
        found[number][0].wait(timeout=processes.SECONDS)
        others = [found[i] for i in range(3) if i != number]
        if why is None:
            time.sleep(2 * failure_detector.GRACE)
            assert [process.poll() for process, _ in others] == [None, None]
            return
        for process, path in others:
            assert process.wait(timeout=processes.SECONDS) == failure_detector.LOST
            last = path.read_text().splitlines()[-1]
            assert re.fullmatch(
                rf"error: process {number} of 3 {why} \(this is process \d\)", last
            ), path.read_text()
        assert time.monotonic() - begin < 30


# A network of its own, with nothing but a loopback, which is taken away once both are there.
CABLE = """
ip link set lo up
for i in 0 1; do
  {python} -u -m tests.distributed.living $i 2 127.0.0.1:7000 stay >{folder}/$i 2>&1 &
done
until grep -qs here {folder}/0 && grep -qs here {folder}/1; do sleep 0.01; done
sleep {pause}
ip link set lo down
wait
"""


# At once, the last line of process 0 is not acknowledged yet.
@pytest.mark.parametrize("pause", [0, 1])
def test_a_machine_that_does_not_answer_is_named(tmp_path, pause):
    # All in it ends with it.
    alone = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*alone, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("wants a network of its own: unshare and ip")
    subprocess.run(
        [*alone, "sh", "-c", CABLE.format(python=sys.executable, folder=tmp_path, pause=pause)],
        check=True,
        timeout=processes.SECONDS,
        cwd=processes.ROOT,
        env=processes.environment(),
    )
    for own in (0, 1):
        assert (tmp_path / str(own)).read_text().splitlines()[-1] == (
            f"error: process {1 - own} of 2 does not answer: its machine stopped, or the network "
            f"broke (this is process {own})"
        )


@pytest.mark.parametrize("found", ["127.0.1.1", "nothing"])
def test_a_name_that_other_machines_cannot_use_is_refused(monkeypatch, found):
    def look_up(name: str) -> str:
        if found == "nothing":
            raise socket.gaierror(-2, "Name or service not known")
        return found

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    with pytest.raises(ValueError, match=f"^the name of this machine, here, stands for {found}, "):
        initialize._check_name("here")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    initialize._check_name("here")


@pytest.mark.parametrize(
    ("own", "theirs", "far"),
    [("10.0.0.1", "10.0.0.2", True), ("10.0.0.1", "10.0.0.1", False), ("::1", "::1", False)],
)
def test_whether_a_process_is_on_another_machine(own, theirs, far):
    class Link:
        def getsockname(self):
            return own, 1

        def getpeername(self):
            return theirs, 2

    assert failure_detector._far(Link()) == far


def test_a_connection_that_has_ended_is_not_far():
    with socket.socket() as link:
        assert not failure_detector._far(link)
