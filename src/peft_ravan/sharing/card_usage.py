"""The code of a model card: how to load an adapter into its base model, and how to predict with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .adapter_files import LABELS_FILE


# more than these are read from their file
_MAX_LABELS_IN_CODE = 20
_PREDICTIONS = {
    "text-classification": """\
inputs = tokenizer("Your text", return_tensors="pt")
with torch.no_grad():
    label = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[label])""",
    "image-classification": """\
inputs = image_processor(Image.open("image.png").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    label = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[label])""",
    "token-classification": """\
inputs = tokenizer("Your text", return_tensors="pt")
with torch.no_grad():
    labels = model(**inputs).logits[0].argmax(-1).tolist()
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
print([(token, model.config.id2label[label]) for token, label in zip(tokens, labels)])""",
    "text-generation": """\
inputs = tokenizer("Your text", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))""",
}
_PREDICTIONS["text2text-generation"] = _PREDICTIONS["text-generation"]


@dataclass(frozen=True)
class Usage:
    """
    What the code of a card depends on.

    Args:
        adapter (`str`): The repository or the folder of the adapter.
        is_on_hub (`bool`): Whether it is a repository.
        auto_class (`str`): The class of transformers that loads the base model.
        task (`str`, *optional*): The task on the Hub.
        base_model (`str`, *optional*): The base model on the Hub, if it is known.
        labels (`Mapping[int, str]`, *optional*): The names of the labels, if they are known.
        num_labels (`int`, *optional*): The number of labels, if the adapter has a task head.
        processing (`str`, *optional*): Where the tokenizer or the image processor is, if there is one.
        image_mode (`str`): What images are converted to: `"RGB"`, or `"L"` for a model of grey images.
    """

    adapter: str
    is_on_hub: bool
    auto_class: str
    task: str | None
    base_model: str | None
    labels: Mapping[int, str] | None
    num_labels: int | None
    processing: str | None
    image_mode: str = "RGB"

    def code(self, *, ravan: bool = False, subfolder: str | None = None, is_trainable: bool = False) -> str:
        """
        Args:
            ravan (`bool`, *optional*, defaults to `False`): Whether the adapter is of Ravan.
            subfolder (`str`, *optional*): The subfolder that it is in.
            is_trainable (`bool`, *optional*, defaults to `False`): Whether it is loaded to be trained. Otherwise the code
                ends with a prediction, if the task is known and there is a tokenizer or an image processor.

        Returns:
            `str`: The code.
        """
        prediction = None if is_trainable or self.processing is None else _PREDICTIONS.get(self.task)
        options = [f'"{self.adapter}"']
        options += [f'subfolder="{subfolder}"'] if subfolder else []
        options += ["is_trainable=True"] if is_trainable else []
        parts = [
            *self._imports(prediction, ravan),
            "",
            *self._label_names(),
            f"base_model = {self.auto_class}.from_pretrained({', '.join(self._base_model_options())})",
            f"model = PeftModel.from_pretrained(base_model, {', '.join(options)})",
        ]
        if prediction is not None:
            name = "image_processor" if "image_processor" in prediction else "tokenizer"
            code = prediction.replace('"RGB"', f'"{self.image_mode}"')
            parts += ["", f'{name} = {self._processor(prediction)}.from_pretrained("{self.processing}")', code]
        return "\n".join(parts)

    def _imports(self, prediction: str | None, ravan: bool) -> list[str]:
        reads_labels = self._has_many_labels()
        used = prediction or ""
        processors = [self._processor(used)] if prediction else []
        return [
            *(["import json", "from pathlib import Path", ""] if reads_labels else []),
            *(["import torch"] if "torch." in used else []),
            *(["import peft_ravan  # registers RAVAN with PEFT"] if ravan else []),
            *(["from huggingface_hub import hf_hub_download"] if reads_labels and self.is_on_hub else []),
            "from peft import PeftModel",
            *(["from PIL import Image"] if "Image." in used else []),
            f"from transformers import {', '.join(sorted([self.auto_class, *processors]))}",
        ]

    @staticmethod
    def _processor(prediction: str) -> str:
        return "AutoImageProcessor" if "image_processor" in prediction else "AutoTokenizer"

    def _has_many_labels(self) -> bool:
        return self.labels is not None and len(self.labels) > _MAX_LABELS_IN_CODE

    def _label_names(self) -> list[str]:
        if not self.labels:
            return []
        names = ", ".join(f"{number}: {_literal(name)}" for number, name in self.labels.items())
        lines = [f"id2label = {{{names}}}"]
        if self._has_many_labels():
            path = f'hf_hub_download("{self.adapter}", "{LABELS_FILE}")'
            path = path if self.is_on_hub else f'"{self.adapter}", "{LABELS_FILE}"'
            lines = [
                f'labels = json.loads(Path({path}).read_text(encoding="utf-8"))',
                "id2label = {int(number): name for number, name in labels.items()}",
            ]
        return [*lines, "label2id = {name: number for number, name in id2label.items()}"]

    def _base_model_options(self) -> list[str]:
        options = [f'"{self.base_model}"' if self.base_model else "..."]
        if self.labels:
            options += ["id2label=id2label", "label2id=label2id"]
        elif self.num_labels:
            options += [f"num_labels={self.num_labels}"]
        # vision and audio models come with the task head of another data set, whose place the adapter's takes
        if len(options) > 1 and self.task in ("image-classification", "audio-classification"):
            options += ["ignore_mismatched_sizes=True"]
        return options


def _literal(name: str) -> str:
    """
    A text as code. Characters that are not visible are escaped, since people copy the code of a card, and so are backticks,
    which could end it.
    """
    code = json.dumps(name, ensure_ascii=False) if name.isprintable() else ascii(name)
    return code.replace("`", r"\x60")
