"""Digests of what runs end with: python digests.py OUT.json  (run in a checkout's root with its python; torchrun for 2 procs)"""
import hashlib, json, os, sys, tempfile, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(1)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft_ravan import RavanConfig
from peft_ravan.trainers import FederatedArguments, FederatedTrainer
from tests.conftest import classification_dataset, tiny_bert
import transformers
transformers.logging.set_verbosity_error()
def ravan(**kw): return RavanConfig(**{**dict(r=4, num_heads=3, task_type="SEQ_CLS", target_modules="all-linear", exclude_modules=".*classifier"), **kw})
def lora(**kw): return LoraConfig(r=2, task_type="SEQ_CLS", **kw)
CASES = {}
for a in ("ravan", "lora"):
    for m in ("fedavg", "fedrpca"):
        CASES[f"{a}-{m}"] = (a, {}, dict(merge_method=m))
    CASES[f"{a}-default"] = (a, {}, {})
    CASES[f"{a}-scaffold"] = (a, {}, dict(scaffold=True, optim="sgd", learning_rate=0.05))
    CASES[f"{a}-proximal"] = (a, {}, dict(proximal_mu=0.1))
    CASES[f"{a}-privacy"] = (a, {}, dict(privacy={"clip_norm": 0.5, "noise_multiplier": 0.3, "noise_seed": 7}))
    CASES[f"{a}-personal"] = (a, {}, dict(local_parameters=["classifier"], clients_per_round=2, num_rounds=4))
    CASES[f"{a}-fedavgm"] = (a, {}, dict(server_optimizer="fedavgm"))
    CASES[f"{a}-schedule"] = (a, {}, dict(lr_scheduler_type="linear", warmup_steps=1, num_rounds=4, clients_per_round=2, participation_weights="examples", partition="dirichlet"))
for sel in ("random", "weight", "gradient"):
    for al in ("layer", "global"):
        CASES[f"ravan-budget-{sel}-{al}"] = ("ravan", {}, dict(client_budgets="uniform", head_selection=sel, head_allocation=al))
CASES["ravan-budget-fedrpca"] = ("ravan", {}, dict(client_budgets="bell", merge_method="fedrpca"))
CASES["ravan-round0"] = ("ravan", dict(init_bases="gradient_svd"), dict(bases_warmup_steps=3, bases_batches=2))
CASES["ravan-round0-rank"] = ("ravan", dict(init_bases="gradient_svd"), dict(bases_warmup_steps=2, bases_batches=2, bases_rank=5, bases_clients=2))
CASES["ravan-round0-personal"] = ("ravan", dict(init_bases="gradient_svd"), dict(bases_warmup_steps=2, bases_batches=2, local_parameters=["classifier"]))
CASES["lora-ffa"] = ("lora", {}, dict(merge_method="ffa_lora"))
CASES["lora-fedsa"] = ("lora", {}, dict(merge_method="fedsa_lora"))
CASES["lora-flexlora"] = ("lora", {}, dict(merge_method="flexlora"))
CASES["ravan-evalclients"] = ("ravan", {}, dict(eval_clients=True, eval_strategy="epoch", personalization_steps=2))
CASES["ravan-dropout"] = ("ravan", dict(ravan_dropout=0.1), {})
two = int(os.environ.get("WORLD_SIZE", "1")) > 1
out = {}
only = sys.argv[2:] 
for name, (a, ckw, kw) in CASES.items():
    if only and name not in only: continue
    with tempfile.TemporaryDirectory() as d:
        defaults = dict(num_rounds=3, num_clients=4, max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=3)
        if two: d = "/tmp/w/digest_two"
        model = get_peft_model(tiny_bert(), {"ravan": ravan, "lora": lora}[a](**ckw))
        import logging; 
        t = FederatedTrainer(model, FederatedArguments(d, **{**defaults, **kw}), train_dataset=classification_dataset(), eval_dataset=classification_dataset(80, seed=1), compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())})
        from transformers import PrinterCallback
        t.remove_callback(PrinterCallback)
        t.train()
        h = hashlib.sha256()
        state = get_peft_model_state_dict(model)
        for k in sorted(state): h.update(k.encode()); h.update(state[k].detach().contiguous().numpy().tobytes())
        losses = [r.get("train_loss") for r in t.state.log_history if "round" in r]
        extra = {}
        if name == "ravan-evalclients": extra = {"cl": [ {k:v for k,v in r.items() if k.startswith("eval_") and "runtime" not in k and "second" not in k} for r in t.state.log_history]}
        out[name] = {"digest": h.hexdigest()[:16], "losses": losses, **extra, "epsilon": [r.get("epsilon") for r in t.state.log_history if "epsilon" in r]}
        import gc; gc.collect()
if int(os.environ.get("RANK", "0")) == 0:
    json.dump(out, open(sys.argv[1], "w"), indent=1)
    print(len(out), "digests")
if two:
    torch.distributed.destroy_process_group()
