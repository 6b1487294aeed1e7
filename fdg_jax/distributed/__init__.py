"""Several processes: start, agreement on settings, exchange of arrays, shutdown."""

from fdg_jax.distributed.collectives import CONNECT_SECONDS, agree, fetch, gather
from fdg_jax.distributed.initialize import free_port, initialize
from fdg_jax.distributed.shutdown import PAUSED, leave, settle

__all__ = [
    "CONNECT_SECONDS",
    "PAUSED",
    "agree",
    "fetch",
    "free_port",
    "gather",
    "initialize",
    "leave",
    "settle",
]
