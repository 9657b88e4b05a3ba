"""Runs the cases of a test file in one group of gloo processes, so that the group is started once.

A case is a function of a `World`. All processes run all cases in one order; a case has passed if it raised on none.
"""

import os
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


class World:
    """A process of the group: its meshes, and what a case compares with."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size
        self.all = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
        self.square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")) if size == 4 else None

    def sum(self, x, mesh=None):
        """The sum of x over the processes of a mesh, by default all."""
        x = x.detach().clone()
        dist.all_reduce(x, group=None if mesh is None else mesh.get_group())
        return x


def _work(rank, size, port, folder, cases):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world = World(rank, size)
    for case in cases:
        torch.manual_seed(0)
        try:
            case(world)
            failed = None
        except Exception:
            failed = traceback.format_exc()
        found = [None] * size
        dist.all_gather_object(found, failed)
        if rank == 0:
            text = "\n".join(f"rank {i}: {x}" for i, x in enumerate(found) if x)
            (Path(folder) / case.__name__).write_text(text)
    dist.destroy_process_group()


def run(cases, size):
    """Run the cases in `size` processes. Returns: for each name of a case, its error, empty if it passed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_work, (size, free_port(), folder, cases), size, start_method="forkserver")
            died = "the group ended before this case"
        except Exception as error:  # a case that killed the group is the first without a file
            died = str(error)
        files = {case.__name__: Path(folder) / case.__name__ for case in cases}
        return {name: file.read_text() if file.exists() else died for name, file in files.items()}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
