"""Different ways to the same adapter: the order of clients, an explicit loop, the mean of the dense weights."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader, SequentialSampler
from transformers import default_data_collator, set_seed

from peft_ravan.trainers import FederatedCallback, FederatedTrainer

from ..conftest import classification_dataset, tiny_bert
from .helpers import adapter_state, arguments, assert_same, lora, make_trainer, ravan


def clients(order=1) -> dict:
    dataset = classification_dataset(80)
    parts = {f"client_{index}": dataset.select(range(20 * index, 20 * index + 10 * (index + 1))) for index in range(3)}
    return dict(list(parts.items())[::order])


@pytest.mark.parametrize("adapter", [ravan, lora])
def test_the_order_of_clients_is_irrelevant(tmp_path, adapter):
    states = []
    for order in (1, -1):
        trainer = make_trainer(
            tmp_path, adapter(), train_dataset=clients(order), num_clients=None, clients_per_round=2
        )
        trainer.train()
        states.append(adapter_state(trainer))
    assert_same(*states, atol=1e-6, rtol=1e-5)


class InOrder(FederatedTrainer):
    """Clients read their data in order, so that a loop can be written without Trainer's samplers."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def test_lora_with_fedit_is_a_loop_of_fifteen_lines(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), lora())
    model.eval()  # the tiny model has no dropout that training would switch on
    reference = copy.deepcopy(model)
    args = arguments(
        tmp_path, num_clients=None, merge_method="fedit", num_rounds=2, max_steps=2, optim="sgd", max_grad_norm=0.0,
        learning_rate=0.1,
    )  # fmt: skip
    trainer = InOrder(model, args, train_dataset=clients(), data_collator=default_data_collator)
    trainer.train()

    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    state = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(2):
        uploads = []
        for dataset in clients().values():
            for name, p in trained.items():
                p.data.copy_(state[name])
            optimizer = torch.optim.SGD(trained.values(), lr=0.1)
            batches = list(DataLoader(dataset, batch_size=8, collate_fn=default_data_collator))
            for step in range(2):
                optimizer.zero_grad()
                reference(**batches[step % len(batches)]).loss.backward()
                optimizer.step()
            uploads.append((len(dataset), {name: p.detach().clone() for name, p in trained.items()}))
        total = sum(n for n, _ in uploads)
        state = {name: sum(n / total * upload[name] for n, upload in uploads) for name in state}

    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), state[name], atol=1e-6, rtol=1e-5)


def test_evaluating_the_merge_is_evaluating_the_mean_of_the_clients_dense_weights(tmp_path):
    """The merged Ravan adapter scores as a base model in which every weight is the mean of the clients' merged weights."""
    weights, sizes = [], []

    class Collect(FederatedCallback):
        def on_client_end(self, args, state, control, model, client, **kwargs):
            merged = copy.deepcopy(model).merge_and_unload()
            weights.append({name: tensor.clone() for name, tensor in merged.state_dict().items()})
            sizes.append(len(trainer.clients[client]))

    set_seed(0)
    trainer = make_trainer(
        tmp_path, ravan(), callbacks=[Collect()], train_dataset=clients(), num_clients=None, num_rounds=1
    )
    trainer.train()
    mean = tiny_bert()
    mean.load_state_dict(
        {
            name: sum(n / sum(sizes) * w[name] for n, w in zip(sizes, weights, strict=True))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in weights[0].items()
        }
    )
    mean.eval(), trainer.model.eval()
    batch = default_data_collator(list(classification_dataset(32, seed=3)))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(**batch).logits, mean(**batch).logits, atol=1e-5, rtol=1e-4)


def test_a_budget_of_all_heads_is_no_budget(tmp_path):
    plain = make_trainer(tmp_path)
    plain.train()
    for head_selection in ("random", "weight", "gradient"):
        budget = make_trainer(tmp_path, client_budgets=1.0, head_selection=head_selection)
        budget.train()
        assert_same(adapter_state(plain), adapter_state(budget))
