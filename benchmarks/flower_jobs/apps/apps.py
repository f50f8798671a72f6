"""The same job as apps of Flower."""

from texts import BATCH_SIZE, CLIENTS, CLIENTS_PER_ROUND, LEARNING_RATE, SEED, load_model, load_part

from peft_ravan.trainers import FederatedArguments
from peft_ravan.trainers.flower import make_client_app, make_server_app


def load_data(context):
    return load_part(context.node_config["partition-id"])


def arguments(config):
    return FederatedArguments(
        config["output-dir"],
        merge_method="fedavg",
        num_clients=CLIENTS,
        clients_per_round=CLIENTS_PER_ROUND,
        num_rounds=config["num-rounds"],
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=SEED,
    )


client = make_client_app(load_model, load_data, arguments)
server = make_server_app(load_model, arguments)
