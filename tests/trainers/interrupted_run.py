"""A run that is killed at a certain moment, or resumed. What it changes stays changed, so it needs its own process."""

import os
import signal
from pathlib import Path

from safetensors.torch import save_file

from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedCallback
from peft_ravan.trainers.client.store import ClientStore
from peft_ravan.trainers.server import checkpoints

from .helpers import resumable_trainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillWithinAClient(FederatedCallback):
    def __init__(self, round_number):
        self.round_number = round_number
        self.rounds = 0

    def on_round_begin(self, args, state, control, **kwargs):
        self.rounds += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.rounds == self.round_number and state.global_step == 2:
            kill()


NUM_ROUNDS = 3
KILL_WITHIN_ROUND = {"bases": 0, "first": 1, "client": 3}
KEEPING = {"scaffold": True, "local_parameters": "classifier"}
GRADIENT_SVD = RavanConfig(r=2, num_heads=2, init_bases="gradient_svd", task_type="SEQ_CLS")


def kill_while_saving() -> None:
    write, calls = checkpoints.safetensors.torch.save_file, []

    def save_and_kill(tensors, path):
        calls.append(path)
        write(tensors, path)
        if len(calls) == 3:  # that of the start, that of round 1, this one
            with open(path, "r+b") as file:
                file.truncate(20)
            kill()

    checkpoints.safetensors.torch.save_file = save_and_kill


def kill_before_the_rename() -> None:
    rename, calls = os.replace, []

    def replace(source, target):
        # of checkpoints, not of the file with the history
        calls.extend([source] * os.path.basename(target).startswith("checkpoint-"))
        if len(calls) == 3:  # that of the start, that of round 1, this one
            kill()
        rename(source, target)

    os.replace = replace


def kill_between_clients_that_keep() -> None:
    save, calls = ClientStore.save, []

    def save_and_kill(store, client, *args):
        calls.append(client)
        if len(calls) == 6:  # two per round: in the third, only the first client has saved its new state
            kill()
        return save(store, client, *args)

    ClientStore.save = save_and_kill


def run_until(moment: str | None, folder: Path) -> None:
    """
    Args:
        moment (`str`, *optional*): When the process is killed: `bases`, `first`, `client`, `saving`, `renaming` or `keeping`.
            By default it is not, and the run in the folder is resumed.
        folder (`Path`): The folder of the run, named after the moment.
    """
    callbacks = [KillWithinAClient(KILL_WITHIN_ROUND[moment])] if moment in KILL_WITHIN_ROUND else []
    if moment == "saving":
        kill_while_saving()
    if moment == "renaming":
        kill_before_the_rename()
    if moment == "keeping":
        kill_between_clients_that_keep()
    options = KEEPING if folder.name == "keeping" else {}
    adapter = GRADIENT_SVD if folder.name == "bases" else None
    trainer = resumable_trainer(folder, adapter=adapter, callbacks=callbacks, num_rounds=NUM_ROUNDS, **options)
    trainer.train(resume_from_checkpoint=None if moment else True)
    save_file(trainer.last_global_state, folder / "end.safetensors")
