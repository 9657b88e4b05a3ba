"""Runs the cases of a test file in one group of gloo processes, so that the group is started once.

A case is a function of a `World`. All processes run all cases in one order; a case has passed if it raised on none.
"""

import multiprocessing
import os
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

TIMEOUT = timedelta(seconds=60)


class World:
    """A process of the group: its meshes, and the folder with what the cases compare with."""

    def __init__(self, rank, size, folder):
        self.rank, self.size, self.folder = rank, size, folder
        self.all = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
        self.square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")) if size == 4 else None

    def sum(self, x, mesh=None):
        """The sum of x over the processes of a mesh, by default all."""
        x = x.detach().clone()
        dist.all_reduce(x, group=None if mesh is None else mesh.get_group())
        return x


def _work(rank, size, port, folder, cases, shared):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world = World(rank, size, shared)
    for case in cases:
        torch.manual_seed(0)
        try:
            case(world)
        except Exception:
            (Path(folder) / f"{case.__name__}.{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
            raise  # the others may wait for this process: the group ends
        (Path(folder) / f"{case.__name__}.{rank}").touch()
    dist.destroy_process_group()


def selected(request, cases):
    """The cases whose tests pytest runs."""
    items = [item for item in request.session.items if "errors" in item.fixturenames and hasattr(item, "callspec")]
    names = {item.callspec.params["case"] for item in items}
    return [case for case in cases if case.__name__ in names]


def run(cases, size, preload, shared=None):
    """Run the cases in `size` processes, which start from one that has imported the modules `preload`.

    shared: a folder for all cases.
    Returns: for each name of a case, its error, empty if it passed.
    """
    multiprocessing.set_forkserver_preload(preload)
    with tempfile.TemporaryDirectory() as folder:
        ended = ""
        try:
            mp.start_processes(_work, (size, free_port(), folder, cases, shared), size, start_method="forkserver")
        except ProcessException as error:
            ended = f"the group ended before this case: {str(error).splitlines()[-1]}"
        return {case.__name__: _error(Path(folder), case.__name__, size, ended) for case in cases}


def _error(folder, name, size, ended):
    files = [folder / f"{name}.{rank}" for rank in range(size)]
    found = [file.read_text() for file in files if file.exists()]
    return "\n".join(filter(None, found)) or ("" if len(found) == size else ended)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait():
    """Wait for the other processes."""
    dist.barrier()
