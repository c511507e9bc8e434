"""What test_distributed.py runs in processes of their own, started as torchrun starts them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spaceexploreai.modeling_spaceexplore import SpaceExploreForRegression
from spaceexploreai.train import dpo, sft
from spaceexploreai.train.trainer import SpaceExploreTrainer

# Forked from a server that has imported once what would take each process seconds. (It does not find this module.)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["spaceexploreai.train.dpo", "spaceexploreai.train.sft", "torch.distributed.fsdp"])
TIME_LIMIT = 300


class Group:
    """Processes of one process group; what each prints is in a file."""

    def __init__(self, size: int, folder: Path, target: Callable, *arguments):
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


def run(rank: int, size: int, port: int, log: Path, target: Callable, arguments: tuple) -> None:
    if size > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in (own | store).items()}
    torch.set_num_threads(1)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    target(*arguments)


# --- training ---


def train(argv: list[str]) -> None:
    """The command without the report that it ends with, which takes longer than a few steps."""
    sft.write_report = lambda *_: None
    sft.main(argv)


def align(argv: list[str]) -> None:
    """The command without the scores that it ends with."""
    dpo.measure_all, dpo.write_report = (lambda *_: None), (lambda *_: None)
    dpo.main(argv)


def train_apart(argv: list[str], folder: Path) -> None:
    """As `train`, into a folder of each process."""
    train([*argv, "--output_dir", str(folder / os.environ["RANK"])])


def train_sharded(argv: list[str], environment: dict[str, str]) -> None:
    """As `train`, as accelerate does on accelerators that it gives this environment to."""
    os.environ |= environment
    make = SpaceExploreTrainer.__init__

    def make_on_accelerators(*args, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # on a CPU it would not shard
        make(*args, **kwargs)

    SpaceExploreTrainer.__init__ = make_on_accelerators
    train(argv)


def train_disturbed(argv: list[str], method: str, call: int, disturb: Callable, target: Callable, *arguments) -> None:
    """As `target`; something happens to the last process before a call, counted from zero, of the trainer's method."""
    original, calls = getattr(SpaceExploreTrainer, method), count()
    is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)

    def disturbed(trainer, *args, **kwargs):
        if next(calls) == call and is_last:
            disturb(*args)
        return original(trainer, *args, **kwargs)

    setattr(SpaceExploreTrainer, method, disturbed)
    target(argv, *arguments)


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def poison(model, inputs: dict[str, torch.Tensor]) -> None:
    inputs["scale"][1] = torch.nan


# --- one step ---


def step(model, batch: dict[str, torch.Tensor], labels: int, processes: int = 1) -> torch.Tensor:
    """A step of gradient descent; returns this process' share of the loss."""
    loss = model(**batch, num_items_in_batch=labels).loss
    (loss * processes).backward()  # gradients are averaged over the processes
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return loss.detach()


def sharded_step(checkpoint: Path, batch: Path, target: Path) -> None:
    """A step of two processes with parts of the network and of the batch; the first one writes the whole weights."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    model = SpaceExploreForRegression.from_pretrained(checkpoint)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    batch = load_file(batch)
    labels = int((batch["labels"] != -100).sum())
    loss = step(model, {name: value[dist.get_rank() :: 2] for name, value in batch.items()}, labels, processes=2)
    dist.all_reduce(loss)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_file(weights, target, metadata={"loss": str(loss.item()), "format": "pt"})
    dist.barrier()
    dist.destroy_process_group()
