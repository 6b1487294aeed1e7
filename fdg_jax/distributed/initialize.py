"""Start of a run in several processes.

Every process runs the same program and dispatches the same actions in the same order. In each, JAX
runs the programs of its own devices and has only the shapes of arrays elsewhere. So the pipeline's
loop is the same for one process and for many.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import os
import socket
import time

import jax
import numpy as np

from fdg_jax.distributed import failure_detector, rendezvous
from fdg_jax.distributed.collectives import CONNECT_SECONDS, gather
from fdg_jax.distributed.shutdown import deadline

# JAX's heartbeat timeout, after which it ends the other processes.
HEARTBEAT_SECONDS = 20
# Sockets of transfers on CPUs, and bytes per send. Chosen by measurement.
_SOCKETS, _CHUNK = 4, 1 << 22
_PATIENCE = 24 * 3600  # seconds


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    seconds: float = CONNECT_SECONDS,
) -> None:
    """Joins the processes of a run; must be called before JAX initialises its devices.

    Without arguments the processes are those started by SLURM, Open MPI or Kubernetes, as detected
    by ``jax.distributed.initialize``. On CPUs it configures transfers between processes, with free
    ports.

    From then on, if a process ends with an error, the others end immediately with status 69 and a
    line that names it.

    Process 0 listens only at the coordinator's address, or at the address "host:port" in the
    environment variable JAX_COORDINATOR_BIND_ADDRESS. With the secret FDG_RUN_TOKEN set to the same
    value in every process, only processes that know it can join. Without it, anyone who can reach
    the port may join or end the run.

    Args:
      coordinator: "host:port" of process 0, the same in every process.
      num_processes: the number of processes.
      process_id: the number of this process, 0 to num_processes - 1.
      seconds: the time limit for all to connect. Where JAX itself would abort the process, it ends
        with an error line and status 2.

    Raises:
      ValueError: inconsistent arguments; a port in use; a coordinator that cannot be reached or is
        not an address of process 0's machine; a process that does not join or has another token; on
        CPUs of several machines, a machine whose name resolves to a loopback address; processes
        with different numbers of devices.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: "
            "give all three, or none where SLURM, Open MPI or Kubernetes starts the processes"
        )
    begin = time.monotonic()
    own_host = socket.gethostname()
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id={process_id}: must lie in 0..{num_processes - 1} with "
                f"num_processes={num_processes}"
            )
        # Before JAX starts, on the port of its service, and with clear error messages.
        bind = os.environ.get(rendezvous.BIND)
        own_host = _call(process_id, num_processes, coordinator, seconds, bind)
    transfers = _cpu_alone()
    if transfers:
        if (detector := failure_detector.current) is not None and detector.apart():
            _check_name(socket.gethostname())
        _set_transfers(own_host)
    left = max(seconds - (time.monotonic() - begin), 1.0)
    with deadline(
        left,
        f"coordinator={coordinator or 'as detected'}: not all of the "
        f"{num_processes or 'detected'} processes came within {seconds:g} s; start them together, "
        "with the same coordinator and num_processes",
    ):
        # JAX's service would install its own handler of SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                # Longer than our deadline, because JAX aborts the process at its own.
                initialization_timeout=int(seconds) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                # By default it listens on all interfaces. Only process 0 uses this.
                coordinator_bind_address=os.environ.get(rendezvous.BIND, coordinator),
            )
        except ValueError as error:
            raise ValueError(
                f"coordinator={coordinator}: SLURM, Open MPI or Kubernetes does not say who is in "
                f"this run ({error}); give coordinator, num_processes and process_id"
            ) from error
        devices = jax.devices()
    if coordinator is None:
        names = [_string(name) for name in gather(_text(own_host))]
        facing = _facing(names) if jax.process_index() == 0 else "127.0.0.1"
        place = _string(gather(_text(f"{_bracketed(facing)}:{free_port(facing)}"))[0])
        _call(jax.process_index(), jax.process_count(), place, seconds)
    if jax.default_backend() == "cpu" and not transfers:
        raise ValueError(
            "JAX_PLATFORMS: there is a plugin for accelerators but no accelerator; set it to cpu"
        )
    counts = [sum(d.process_index == i for d in devices) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ValueError(
            f"devices: the processes have {', '.join(map(str, counts))}; give each the same number"
        )


def free_port(host: str = "127.0.0.1") -> int:
    """An unused port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        return int(server.getsockname()[1])


def _call(own: int, count: int, coordinator: str, seconds: float, bind: str | None = None) -> str:
    """Connects the processes and starts failure detection; returns this machine's address."""
    failure_detector.current, host = rendezvous.roll_call(own, count, coordinator, seconds, bind)
    return host


def _facing(names: list[str]) -> str:
    """The address by which the other processes reach this machine."""
    try:
        address = str(rendezvous.addresses(names[0], 0)[0][1][0])
    except OSError:
        address = "127.0.0.1"
    others = [name for name in names if name != names[0]]
    if others and ipaddress.ip_address(address).is_loopback:
        # Its own name resolves to a loopback address; the kernel knows the one used for another.
        with contextlib.suppress(OSError):
            family, place = rendezvous.addresses(others[0], 1)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(place)  # sends nothing
                address = str(probe.getsockname()[0])
    return address


def _cpu_alone() -> bool:
    """Whether JAX has only CPU devices."""
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if chosen:
        return bool(chosen.split(",")[0] == "cpu")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def _check_name(name: str) -> None:
    """Checks that this machine's name resolves to an address reachable by others."""
    try:
        found = socket.gethostbyname(name)
    except OSError:
        found = "nothing"
    if found == "nothing" or ipaddress.ip_address(found).is_loopback:
        raise ValueError(
            f"the name of this machine, {name}, stands for {found}, where other machines do not "
            "reach it, and JAX's collectives on CPUs go by the name; give its address in /etc/hosts"
        )


def _set_transfers(host: str) -> None:
    """Configures device_put between processes on CPUs; accelerators have their own transfers."""
    address = str(rendezvous.addresses(host, 0)[0][1][0])
    settings = {
        "jax_force_dcn_cross_host_transfers": True,
        # A port of 0 would hang.
        "jax_cross_host_transfer_socket_address": f"{_bracketed(address)}:{free_port(address)}",
        "jax_cross_host_transfer_transfer_size": _CHUNK,
        # The other process may still be compiling; lost processes are detected by heartbeats.
        "jax_cross_host_transfer_timeout_seconds": _PATIENCE,
        "jax_cross_host_transport_addresses": ",".join([f"{_bracketed(address)}:0"] * _SOCKETS),
    }
    for name, value in settings.items():
        jax.config.update(name, value)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _string(value: np.ndarray) -> str:
    return bytes(value).decode().rstrip("\0")


def _text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode()[:256].ljust(256, b"\0"), np.uint8)
