"""Training with Ravan: Trainer, TRL, several processes, torch.compile."""

import importlib.util

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from peft_ravan import RavanConfig

from ..conftest import CHECKPOINTING, classification_dataset, randomize_adapter, sentence, tiny_bert, tiny_llama
from ..forked import join, start_together


def arguments(folder, cls=TrainingArguments, **kwargs):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(str(folder), **{**defaults, **kwargs})


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, atol=0, rtol=0)


def test_trainer_resumes_bit_for_bit(tmp_path):
    def train(folder, **kwargs):
        model = get_peft_model(tiny_bert(), RavanConfig(r=3, num_heads=2, task_type="SEQ_CLS"))
        trainer = Trainer(model, arguments(folder), train_dataset=classification_dataset())
        trainer.train(**kwargs)
        return adapter(model)

    whole = train(tmp_path)
    assert_same(train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)


def test_sft_trainer_of_trl(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    dataset = datasets.Dataset.from_dict({"text": [sentence(index) for index in range(32)]})
    config = RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM")

    def make():
        args = arguments(tmp_path, trl.SFTConfig, max_length=16, bf16=False)
        return trl.SFTTrainer(
            tiny_llama(), args, train_dataset=dataset, processing_class=tokenizer, peft_config=config
        )

    trainer = make()
    trainer.train()
    trained = adapter(trainer.model)
    assert any(tensor.any() for name, tensor in trained.items() if "ravan_H" in name)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(adapter(resumed.model), trained)


def test_dpo_trainer_of_trl_takes_the_base_model_as_reference(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    dataset = datasets.Dataset.from_dict(
        {
            "prompt": [sentence(index) for index in range(16)],
            "chosen": [f" {sentence(index + 6)}" for index in range(16)],
            "rejected": [f" {sentence(index + 30)}" for index in range(16)],
        }
    )

    def make():
        return trl.DPOTrainer(
            tiny_llama(),
            args=arguments(tmp_path, trl.DPOConfig, bf16=False, logging_steps=1),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM"),
        )

    trainer = make()
    assert trainer.ref_model is None
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    # a fresh adapter is its own reference: log 2
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(adapter(resumed.model), adapter(trainer.model))


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = get_peft_model(tiny_llama(), RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM")).train()
        randomize_adapter(model)
        if checkpointing:
            model.enable_input_require_grads()
            getattr(model.base_model.model, f"{CHECKPOINTING}_enable")()
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


@pytest.mark.parametrize("until", ["backward", "changed"])
@pytest.mark.parametrize("num_tokens", [3, 300], ids=["thin", "dense"])
def test_the_layer_compiles_without_graph_breaks(num_tokens, until):
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(32, 32)), RavanConfig(r=4, num_heads=2, target_modules=["0"])
    )
    randomize_adapter(model)
    model.keep_formed_weights(until)
    # the eager backend traces like any other, and needs no compiler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(num_tokens, 32)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert model.base_model.model[0].ravan_H["default"].grad.any()


TWO_PROCESSES = """
import gc, torch
from accelerate import Accelerator
from peft import get_peft_model
from peft_ravan import RavanConfig
from tests.conftest import tiny_llama


def train():
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny_llama(), RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert type(model).__name__ == "DistributedDataParallel" and model.broadcast_buffers
    bases = {buffer.data_ptr() for name, buffer in model.named_buffers() if ".ravan_" in name}
    assert bases and not bases & {buffer.data_ptr() for buffer in model.modules_buffers}, "bases are sent at each step"
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(3):
        tokens = torch.randint(0, 64, (2, 8), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.unwrap_model(model).state_dict()
    mine = torch.cat([tensor.flatten() for name, tensor in sorted(state.items()) if "ravan_" in name])
    everybody = accelerator.gather(mine[None])
    assert accelerator.num_processes == len(everybody) == 2
    assert torch.equal(everybody[0], everybody[1]), "bases or cores differ between the processes"
    assert any(tensor.any() for name, tensor in state.items() if "ravan_H" in name)


train()
# A thread of gloo that lets go of the last tensors while the interpreter ends aborts the process. The group waits for its
# threads, once nothing else holds on to it: the wrapped model, which is in cycles, does.
gc.collect()
torch.distributed.destroy_process_group()
"""


SHARDED = """
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from peft_ravan import RavanConfig
from tests.conftest import tiny_llama
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))


def train(shard):
    model = get_peft_model(tiny_llama(), RavanConfig(r=4, num_heads=2, task_type="CAUSAL_LM"))
    if shard:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        # the same data in both processes, so that the mean over processes is what one process computes
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return {name: full(tensor.detach()).clone() for name, tensor in get_peft_model_state_dict(model).items()}


sharded, whole = train(True), train(False)
assert sharded.keys() == whole.keys()
for name in whole:
    torch.testing.assert_close(sharded[name], whole[name], atol=1e-6, rtol=1e-5)
assert any(tensor.any() for name, tensor in whole.items() if "ravan_H" in name)
dist.destroy_process_group()
"""


ZERO_3 = """
import deepspeed
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft_ravan import RavanConfig
from tests.conftest import tiny_llama

deepspeed.init_distributed("gloo")


def train(zero):
    model = get_peft_model(tiny_llama(), RavanConfig(r=4, num_heads=2, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if zero:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    for step in range(3):
        tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        if zero:
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        else:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=zero):
        return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


zero, whole = train(True), train(False)
assert zero.keys() == whole.keys()
for name in whole:
    torch.testing.assert_close(zero[name], whole[name], atol=1e-6, rtol=1e-5)
assert any(tensor.any() for name, tensor in whole.items() if "ravan_H" in name)
torch.distributed.destroy_process_group()
"""
# it has to be built against the torch of the environment, so the package's extras leave it out
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install --no-build-isolation deepspeed",
)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(TWO_PROCESSES, id="DDP"),
        pytest.param(SHARDED, id="FSDP"),
        pytest.param(ZERO_3, id="ZeRO-3", marks=needs_deepspeed),
    ],
)
def test_two_processes_have_the_same_bases_and_cores(code):
    join(start_together(run_script, code))


def run_script(code: str) -> None:
    exec(compile(code, "train.py", "exec"), {"__name__": "__main__"})


def test_transformers_own_adapter_methods(tmp_path, input_ids):
    base = tiny_llama().eval()
    expected = base(input_ids).logits
    base.add_adapter(RavanConfig(r=3, num_heads=2, init_weights=False), adapter_name="mine")
    adapted = base(input_ids).logits
    assert not torch.allclose(adapted, expected, atol=1e-4)
    base.save_pretrained(tmp_path)
    loaded = tiny_llama().eval()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded(input_ids).logits, adapted)
    loaded.disable_adapters()
    assert torch.equal(loaded(input_ids).logits, expected)


def test_status_and_auto_classes(tmp_path):
    from peft import AutoPeftModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, RavanConfig(r=3, num_heads=2, task_type="CAUSAL_LM"))
    status = model.get_model_status()
    assert status.peft_types == {"default": "RAVAN"} and status.active_adapters == ["default"]
    assert status.num_adapter_layers == 4 and status.trainable_params == 4 * 2 * (3**2 + 1)
    model.save_pretrained(tmp_path / "adapter")
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), PeftModel)
