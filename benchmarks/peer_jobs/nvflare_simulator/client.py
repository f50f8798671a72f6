"""The script of a client in NVFlare's simulator."""

import nvflare.client as flare
import torch
from common import BATCH_SIZE, LEARNING_RATE, MAX_GRAD_NORM, STEPS, load_examples
from model import AdapterModel
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    wrapped = AdapterModel()
    model = wrapped.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flare.init()
    index = int(flare.get_site_name().removeprefix("site-")) - 1
    examples = {name: torch.from_numpy(values) for name, values in load_examples(index).items()}
    loader = DataLoader(TensorDataset(*examples.values()), BATCH_SIZE, shuffle=True)
    while flare.is_running():
        received = flare.receive()
        wrapped.load_state_dict({name: torch.as_tensor(values) for name, values in received.params.items()})
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)
        model.train()
        for _, batch in zip(range(STEPS), loader, strict=False):
            model(**dict(zip(examples, batch, strict=True))).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        # NVFlare weights clients by this number
        meta = {"NUM_STEPS_CURRENT_ROUND": len(loader.dataset)}
        flare.send(
            flare.FLModel(params={name: value.cpu() for name, value in wrapped.state_dict().items()}, meta=meta)
        )


if __name__ == "__main__":
    main()
