"""The model of NVFlare's server, which sends the adapter only, like NVFlare's example llm_hf."""

import torch
from common import load_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict


class AdapterModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = load_model()

    def state_dict(self, *args, **kwargs):
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict, *args, **kwargs):
        return set_peft_model_state_dict(self.model, state_dict)
