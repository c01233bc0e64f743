"""Two processes on this machine, as torchrun would start them."""

from __future__ import annotations

import multiprocessing.connection
import os
import socket
from collections.abc import Callable


def two_processes(target: Callable, *given: object) -> list[int | None]:
    """Exit codes of two processes `target(rank, port, *given)`; where one fails, the other is stopped."""
    context = multiprocessing.get_context("spawn")  # a fork might inherit a lock of polars' allocator
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=target, args=(rank, port, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    running = processes
    while running and not any(process.exitcode for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
    for process in processes:
        process.kill() if process.is_alive() else None
        process.join()
    return [process.exitcode for process in processes]


def as_torchrun(rank: int, port: int) -> None:
    """Have this process see what torchrun tells one of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
