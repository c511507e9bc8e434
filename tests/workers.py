"""What test_distributed.py runs in processes of their own, started as torchrun starts them."""

import multiprocessing
import os
import signal
import time
from itertools import count
from pathlib import Path

import torch
from torch import distributed as dist

from spaceexploreai.train import sft
from spaceexploreai.train.trainer import SpaceExploreTrainer

# Forked from a server that has imported everything once; each process would need seconds for it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
TIME_LIMIT = 300


class Group:
    """Processes of one process group; what each prints is in a file."""

    def __init__(self, size: int, folder: Path, target, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(size)]
        # As torchrun does: a port that the launcher has cannot be taken by another before the processes use it.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            SERVER.Process(target=run, args=(rank, size, self.store.port, log, target, arguments))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """Exit codes. A process that hangs is an error."""
        limit = time.monotonic() + TIME_LIMIT
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, self.printed()
        return [process.exitcode for process in self.processes]

    def succeed(self) -> None:
        assert self.wait() == [0] * len(self.processes), self.printed()

    def printed(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def run(rank: int, size: int, port: int, log: Path, target, arguments: tuple) -> None:
    if size > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in (own | store).items()}
    torch.set_num_threads(1)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    target(*arguments)


def train(argv: list[str]) -> None:
    """The command without the report that it ends with, which takes longer than a few steps."""
    sft.write_report = lambda *_: None
    sft.main(argv)


def killed(argv: list[str], batch: int) -> None:
    """Training of which the last process is killed at its `batch`-th batch, counted from zero."""
    compute_loss, batches = SpaceExploreTrainer.compute_loss, count()

    def deadly(*args, **kwargs):
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if next(batches) == batch and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(*args, **kwargs)

    SpaceExploreTrainer.compute_loss = deadly
    train(argv)
