"""A cache of the Hub with tiny models, built from configs, under the names that PEFT's tests load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from transformers import PreTrainedModel


REVISION = "0" * 40
VOCAB_SIZE = 128

_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_WIDTHS, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "num_labels": 2}
_DECODER = {**_WIDTHS, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
# wide enough for the ranks that PEFT's tests ask for
_EXPERTS = {
    **_DECODER,
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
}
_OPT = {
    **_TOKENS,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS}
_CLIP = {**_WIDTHS, **_TOKENS, "projection_dim": 32, "max_position_embeddings": 64}
_BART = {
    **_TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    **_TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_DEBERTA = {**_ENCODER, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}


def _model(model_class: str, config_class: str, **fields) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**fields)
        return getattr(transformers, model_class)(config)

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _model("GPT2LMHeadModel", "GPT2Config", **_GPT),
    "bert-base-uncased": _model("BertForSequenceClassification", "BertConfig", **_ENCODER),
    # with so many tokens that an adapter has few parameters in comparison, which one of the tests requires
    "peft-internal-testing/tiny-random-OPTForCausalLM": _model(
        "OPTForCausalLM", "OPTConfig", **{**_OPT, "vocab_size": 1024}
    ),
    # not tied, because merging an adapter into tied embeddings also changes the head
    "peft-internal-testing/opt-125m": _model(
        "OPTForCausalLM",
        "OPTConfig",
        **{
            **_OPT,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 64,
            "num_hidden_layers": 12,
            "tie_word_embeddings": False,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _model("GPT2LMHeadModel", "GPT2Config", **_GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _model("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _model("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": _model("Qwen2ForCausalLM", "Qwen2Config", **_DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _model(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=8
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _model(
        "T5ForConditionalGeneration", "T5Config", **_T5
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _model(
        "BartForConditionalGeneration", "BartConfig", **_BART
    ),
    "peft-internal-testing/tiny-random-BertModel": _model("BertModel", "BertConfig", **_ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": _model("RobertaModel", "RobertaConfig", **_ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": _model("DebertaModel", "DebertaConfig", **_DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": _model("DebertaV2Model", "DebertaV2Config", **_DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _model(
        "BertForSequenceClassification", "BertConfig", **_ENCODER
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _model(
        "RobertaForSequenceClassification", "RobertaConfig", **_ENCODER
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _model(
        "LlamaForSequenceClassification", "LlamaConfig", **_DECODER, num_labels=1
    ),
    "peft-internal-testing/tiny-random-t5": _model("T5ForConditionalGeneration", "T5Config", **_T5),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _model("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    "trl-internal-testing/tiny-Llama4ForCausalLM": _model(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **_EXPERTS,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=1,
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": _model(
        "GptOssForCausalLM", "GptOssConfig", **_EXPERTS, num_experts_per_tok=2
    ),
    "tiiuae/falcon-mamba-tiny-dev": _model(
        "FalconMambaForCausalLM", "FalconMambaConfig", **_TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": _model(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        **{**_DECODER, "hybrid_override_pattern": "M*"},
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=2,
    ),
    "peft-internal-testing/tiny-clip-text-2": _model("CLIPTextModel", "CLIPTextConfig", **_CLIP),
}
# a model that is loaded at a revision that has a name
REVISIONS = {"peft-internal-testing/tiny-random-BertModel": "v2.0.0"}
# the same for an adapter, by PEFT's tests of configs
ADAPTERS = {"peft-internal-testing/tiny-opt-lora-revision": "test"}


def _snapshot(hub_cache: Path, repository: str, branch: str = "main") -> Path:
    root = hub_cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / branch).write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def build_hub_cache(hub_cache: Path) -> None:
    """
    Write all models and adapters in the layout of the Hub's cache, where all loaders find them without a network.

    Args:
        hub_cache (`Path`): The folder for `HF_HUB_CACHE`.
    """
    for repository, build in MODELS.items():
        snapshot = _snapshot(hub_cache, repository)
        build().save_pretrained(snapshot)
        if repository in REVISIONS:
            (snapshot.parents[1] / "refs" / REVISIONS[repository]).write_text(REVISION)
    for repository, branch in ADAPTERS.items():
        LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m").save_pretrained(
            _snapshot(hub_cache, repository, branch)
        )
