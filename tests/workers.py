"""What test_distributed.py runs in processes of their own, started as torchrun starts them."""

import multiprocessing
import os
import signal
import sys
import time
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
    """Processes of one process group; what they print is in a file each."""

    def __init__(self, size: int, folder: Path, target, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(size)]
        # The launcher has the store, hence no port can be taken by another before the processes listen at it.
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
    sys.stderr.reconfigure(line_buffering=True)
    target(*arguments)


def train(argv: list[str]) -> None:
    """`train/sft.py` without its report, which takes longer than the few steps."""
    run = sft.parse_run(argv)
    trainer = sft.train(run)
    sft.save_checkpoint(trainer, run.training.output_dir)
    sft.leave(trainer)
