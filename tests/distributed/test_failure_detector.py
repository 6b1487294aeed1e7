"""Processes find one another, or say who is missing; the end of one ends the others, by name."""

import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from fdg_jax import distributed
from fdg_jax.distributed import failure_detector
from tests import processes


def call(count: int, *calls: tuple[int, int], seconds: float) -> list[str]:
    """What processes hear that say to be one of so many, where 0 believes in ``count``."""
    coordinator = f"127.0.0.1:{distributed.free_port()}"
    heard = ["here"] * (1 + len(calls))

    def one(place: int, own: int, count: int) -> None:
        try:
            failure_detector.roll_call(own, count, coordinator, seconds)
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


def test_a_stranger_is_not_counted(monkeypatch):
    monkeypatch.setattr(failure_detector, "HELLO_SECONDS", 0.2)
    port = distributed.free_port()
    heard = []

    def zero() -> None:
        with pytest.raises(ValueError, match="process 1 of 2 did not come") as caught:
            failure_detector.roll_call(0, 2, f"127.0.0.1:{port}", 1.5)
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

        def answer() -> None:
            link, _ = server.accept()
            link.sendall(b"220 mail.example.org\n")
            link.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="what answers there is another program"):
            failure_detector.roll_call(1, 2, f"127.0.0.1:{server.getsockname()[1]}", 5)
        thread.join()


def test_one_that_came_and_ended_is_named_before_the_others_have_come():
    port = distributed.free_port()

    def come_and_go() -> None:
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(b"hello 1 3\n")
            time.sleep(0.3)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    with pytest.raises(ValueError, match="process 1 of 3 ended before all had come"):
        failure_detector.roll_call(0, 3, f"127.0.0.1:{port}", 60)
    thread.join()


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
        end = time.monotonic() + processes.SECONDS
        while not all("here" in path.read_text() for _, path in found):
            assert time.monotonic() < end, [path.read_text() for _, path in found]
            time.sleep(0.02)
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
until grep -qs here {folder}/0 && grep -qs here {folder}/1; do sleep 0.1; done
ip link set lo down
wait
"""


def test_a_machine_that_does_not_answer_is_named(tmp_path):
    # All in it ends with it.
    alone = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*alone, "ip", "link", "set", "lo", "up"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("wants a network of its own: unshare and ip")
    subprocess.run(
        [*alone, "sh", "-c", CABLE.format(python=sys.executable, folder=tmp_path)],
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
        distributed._check_name("here")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    distributed._check_name("here")


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
