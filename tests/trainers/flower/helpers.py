"""Federations in the nodes of an in-process grid, with the data and the arguments of the tests of the trainers."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_ravan.trainers import FederatedArguments, FederatedTrainer, make_clients, read_history
from peft_ravan.trainers.flower import make_client_app, make_server_app

from ...conftest import classification_dataset, tiny_bert
from ..helpers import arguments, assert_same, comparable, make_trainer, ravan
from .grid import InProcessGrid


NUM_CLIENTS = 3
_MODELS: dict[str, bytes] = {}  # each node loads the model anew for each message


def load_model(adapter=None):
    adapter = adapter or ravan()
    key = repr(adapter)
    if key not in _MODELS:
        _MODELS[key] = pickle.dumps(get_peft_model(tiny_bert(), adapter))
    return pickle.loads(_MODELS[key])


def small(folder, **kwargs) -> FederatedArguments:
    return arguments(folder, **{"num_clients": NUM_CLIENTS, "max_steps": 1, **kwargs})


class Federation:
    """
    The server app and the client apps of one federation, in one process.

    Args:
        args (`FederatedArguments`): The arguments.
        make_adapter (`Callable`, *optional*): Makes the configuration of the adapter.
        node_configs (`dict`, *optional*): What is added to the configuration of a client's node, by its name.
        grid_class (`type`, *optional*): The grid.
        client_options (`dict`, *optional*): Options of the client apps.
        **server_options: Options of the server app.
    """

    def __init__(
        self,
        args,
        make_adapter=ravan,
        node_configs=None,
        grid_class=InProcessGrid,
        client_options=None,
        **server_options,
    ):
        self.args, self.folder = args, Path(args.output_dir)
        parts = make_clients(classification_dataset(), args)

        def load(config=make_adapter):
            return load_model(config())

        self._load_data = lambda context: parts[str(context.node_config["data"])]
        client_app = make_client_app(load, self._load_data, args, **(client_options or {}))
        nodes: dict[int, Mapping[str, Any]] = {
            100 + 7 * index: {"client-name": name, "data": name, **(node_configs or {}).get(name, {})}
            for index, name in enumerate(sorted(parts, reverse=True))
        }
        self.grid = grid_class(client_app, nodes)
        self.app = make_server_app(load, args, **{"node_timeout": 0.0, **server_options})

    def make_other_adapter_at(self, node_id: int, make_adapter) -> None:
        """Let one node make another adapter than the server, as with another torch, whose random numbers differ."""
        load = functools.partial(load_model, make_adapter())
        self.grid.other_apps[node_id] = make_client_app(load, self._load_data, self.args)

    def run(self) -> None:
        self.app(self.grid, self.grid.server_context())

    def adapter(self) -> dict[str, torch.Tensor]:
        """What the server app has saved."""
        return load_file(self.folder / "adapter_model.safetensors")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of its rounds."""
        return read_history(self.folder)


def trained(folder: Path, make_adapter=ravan, **options) -> FederatedTrainer:
    """The federation that a [`Federation`] with these options is compared with, in the folder `trainer`."""
    options = {"num_clients": NUM_CLIENTS, "max_steps": 1, **options}
    trainer = make_trainer(folder / "trainer", make_adapter(), **options)
    trainer.train()
    trainer.save_model()
    return trainer


def assert_same_as_trainer(federation: Federation) -> None:
    """Run a federation in the folder `flower`, and compare it bit for bit with the one [`trained`] beside it."""
    federation.run()
    folder = federation.folder.parent / "trainer"
    assert_same(federation.adapter(), load_file(folder / "adapter_model.safetensors"))
    assert comparable(federation.records) == comparable(read_history(folder))
