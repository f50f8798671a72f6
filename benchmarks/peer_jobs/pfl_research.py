"""With pfl-research: python pfl_research.py OUTPUT_DIR NUM_ROUNDS, or under torchrun. It follows pfl's benchmark of LLMs."""

import functools
import itertools
import sys
import types

import torch
from common import (
    BATCH_SIZE,
    CLIENTS,
    CLIENTS_PER_ROUND,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    STEPS,
    drawn_clients,
    load_examples,
    load_model,
    note_round,  # measures
)
from peft import get_peft_model_state_dict  # measures
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback  # measures
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops  # measures
from pfl.metrics import Metrics  # measures
from pfl.model.pytorch import PyTorchModel


def loss(model, input_ids, attention_mask, labels):
    return model.train()(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss


class RoundNotes(TrainingProcessCallback):  # measures
    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # measures
        if pytorch_ops.distributed.global_rank == 0:  # measures
            adapter = functools.partial(get_peft_model_state_dict, model.pytorch_model)  # measures
            note_round(sys.argv[1], central_iteration + 1, adapter)  # measures
        return False, Metrics()  # measures


def main(output_dir: str, num_rounds: int) -> None:
    lora = load_model()
    lora.loss = types.MethodType(loss, lora)
    lora.metrics = lambda *batch: {}  # pfl evaluates clients in the first round, which takes time
    model = PyTorchModel(
        lora,
        functools.partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
        torch.optim.SGD([parameter for parameter in lora.parameters() if parameter.requires_grad], lr=1.0),
    )
    clients = {
        index: Dataset([torch.from_numpy(values) for values in load_examples(index).values()], user_id=str(index))
        for index in range(CLIENTS)
    }
    sampler = itertools.chain.from_iterable(drawn_clients())
    data = FederatedDataset(clients.get, functools.partial(next, sampler))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=num_rounds,
            evaluation_frequency=num_rounds,
            train_cohort_size=CLIENTS_PER_ROUND,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=STEPS,
            local_batch_size=BATCH_SIZE,
            local_learning_rate=LEARNING_RATE,
            local_max_grad_norm=MAX_GRAD_NORM,
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[RoundNotes()],  # measures
    )
    lora.save_pretrained(output_dir)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
