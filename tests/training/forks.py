"""Forked processes that train: torch and headscope are already imported, so that they start at once."""

import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def fork(work: Callable[[], object], log: Path) -> int:
    """Run ``work`` in a child process; its id. An error goes into ``log``, and the exit code is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: torch has threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's threads do not exist in a child
        work()
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def fork_group(work: Callable[[int], object], folder: Path, count: int = 2) -> list[int]:
    """Run ``work(rank)`` in each process of a gloo group that meets in a file of ``folder``; their ids."""
    folder.mkdir()

    def join(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
        work(rank)

    return [fork(lambda rank=rank: join(rank), folder / f"{rank}.log") for rank in range(count)]


def exit_code(pid: int, seconds: float = 60) -> int:
    """The exit code of a child, negative for a signal, once it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the process ran for more than {seconds} s")


def wait_for(path: Path, seconds: float = 60) -> None:
    """Return once the file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"no {path.name} after {seconds} s")
        time.sleep(0.005)
