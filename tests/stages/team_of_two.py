"""Trains on two processes, then on two that are interrupted and two that go on, forked where torch is imported.

    python team_of_two.py UNDISTURBED INTERRUPTED [OVERRIDE ...]

``torchrun`` starts itself and a process for each, which takes many times as long as the training. What it tells them is
in their environment. Those below the second output root are ended by SIGTERM, as torchrun does, once there is a
checkpoint. Prints how the six ended: exit codes, or minus the signal.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import at their first step
from omegaconf import DictConfig
from tiny_runs import tiny

from nlme_sbi.stages.train_flow import train_flow

SIZE = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start_team(cfg: DictConfig) -> list[int]:
    """Process ids of a team that trains with this configuration."""
    told = {"TORCHELASTIC_RUN_ID": "forked", "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1"}
    told["MASTER_PORT"] = str(free_port())
    members = []
    for rank in range(SIZE):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(told, RANK=str(rank), LOCAL_RANK=str(rank))
                train_flow(cfg)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        members.append(child)
    return members


def ends(members: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(member, 0)[1]) for member in members]


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)  # to the standard error
    undisturbed, root = Path(sys.argv[1]), Path(sys.argv[2])
    whole = ends(start_team(tiny("train_flow", "mrna_two_rate", undisturbed, *sys.argv[3:])))
    cfg = tiny("train_flow", "mrna_two_rate", root, *sys.argv[3:])
    # The checkpoint of one process is there already.
    before = set(root.rglob("training.pt"))
    interrupted = start_team(cfg)
    deadline = time.monotonic() + 60
    while not set(root.rglob("training.pt")) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    for member in interrupted:
        os.kill(member, signal.SIGTERM)
    ended = {"undisturbed": whole, "interrupted": ends(interrupted), "went_on": ends(start_team(cfg))}
    print(json.dumps(ended))  # noqa: T201
