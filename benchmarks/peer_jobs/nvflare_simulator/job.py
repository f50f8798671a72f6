"""In NVFlare's simulator: python job.py OUTPUT_DIR NUM_ROUNDS NUM_THREADS. It follows NVFlare's example hello-pt."""

import sys
from pathlib import Path

from common import CLIENTS, CLIENTS_PER_ROUND
from model import AdapterModel
from notes import RoundNotes  # measures
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv


if __name__ == "__main__":
    output_dir, num_rounds, num_threads = sys.argv[1:]
    recipe = FedAvgRecipe(
        name="lora",
        model=AdapterModel(),
        min_clients=CLIENTS_PER_ROUND,
        num_rounds=int(num_rounds),
        train_script=str(Path(__file__).with_name("client.py")),
    )
    recipe._job.to_server(RoundNotes(output_dir))  # measures
    recipe.execute(SimEnv(num_clients=CLIENTS, num_threads=int(num_threads), workspace_root=output_dir))
