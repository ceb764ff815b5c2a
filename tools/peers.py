"""The other sides of tools.bench: models and loops as they are written over transformers, PEFT,
bitsandbytes, TRL and lm-eval. Each is imported where it is used.
"""

import tempfile
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import lora
from common import hub
from packing import IGNORE, pad
from tools import mfu


def load(folder, dtype, device):
    """transformers' model, with torch's fused attention: it drops a mask that hides nothing."""
    from transformers import AutoModelForCausalLM

    options = dict(dtype=dtype, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, **options).to(device)


def random(c, device, dtype, quant=None):
    """transformers' Llama of the shape c with mfu.build's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = hub.config_json(c, dtype)
    config = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        peer = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    names = blocks(peer) if quant else ()
    mfu.build(peer, device, dtype, names, partial(bitsandbytes_linear, dtype=dtype))
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(device)
    return peer


def quantise(peer, dtype):
    for name in blocks(peer):
        peer.set_submodule(name, bitsandbytes_linear(peer.get_submodule(name), dtype))
    return peer


def blocks(peer) -> list[str]:
    """The names of the linear layers in a transformers model's blocks."""
    return [
        name for name, m in peer.named_modules() if isinstance(m, nn.Linear) and ".layers." in name
    ]


def bitsandbytes_linear(linear, dtype):
    """bitsandbytes' layer with this weight, double-quantised, computing in dtype."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        linear.in_features,
        linear.out_features,
        False,
        dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return new.to(linear.weight.device)


def nf4(weight):
    """A weight in NF4 → bitsandbytes' function that makes it whole."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return partial(dequantize_4bit, codes, state)


def peft(peer, rank: int):
    """With LoRA on every linear layer of its blocks, in float32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora.GROUPS["all"])
    return get_peft_model(peer, config)


def prepare(model, checkpointing: bool):
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    return model.train()


# ---------------------------------------------------------------- losses
def padded(examples, device):
    tokens, mask = pad([ids for ids, _ in examples], device=device)
    labels, _ = pad([labels for _, labels in examples], fill=IGNORE, device=device)
    return tokens, mask.long(), labels


def own_loss(examples, device):
    """The model's own, of a padded batch: what a loop by hand has."""
    tokens, mask, labels = padded(examples, device)
    batch = dict(input_ids=tokens, attention_mask=mask, labels=labels)
    return lambda m: m(**batch).loss


def careful_loss(examples, device):
    """The head runs on the targets' places alone."""
    tokens, mask, labels = padded(examples, device)
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # predicted from column
    target = labels[row, column + 1]

    def loss(m):
        h = m.model(tokens, attention_mask=mask).last_hidden_state
        return F.cross_entropy(m.lm_head(h[row, column]), target)

    return loss


def trl(peer, folder, pairs, chosen, rejected, device):
    """TRL's DPOTrainer, with the folder's tokenizer → its model, and its loss of the pairs; chosen,
    rejected: the reference's log-probabilities.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as out:
        cpu, given = device.type == "cpu", dict(report_to=[], beta=0.1, bf16=False)
        config = DPOConfig(out, use_cpu=cpu, precompute_ref_log_probs=True, **given)
        some = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        tok = AutoTokenizer.from_pretrained(folder)
        trainer = DPOTrainer(peer, None, config, train_dataset=some, processing_class=tok)
    names = "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"
    before = zip(chosen.tolist(), rejected.tolist(), strict=True)
    rows = [(*pair, *logps) for pair, logps in zip(pairs, before, strict=True)]
    batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])
    batch = {name: x.to(device) for name, x in batch.items()}
    return trainer.model.to(device), lambda m: trainer.compute_loss(m, batch)


# ---------------------------------------------------------------- answers
def sampler(peer, prompts, most: int, end):
    """→ a function of a seed, which gives the answers of up to `most` tokens. On a GPU with a cache
    that grows or the static one, for which transformers compiles the model: whichever is faster.
    """
    tokens, mask = pad(prompts, left=True, device=peer.device)
    options = dict(max_new_tokens=most, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)
    options |= dict(eos_token_id=end) if end is not None else dict(min_new_tokens=most)

    def answers(seed, cache=None):
        torch.manual_seed(seed)
        given = dict(attention_mask=mask.long(), cache_implementation=cache)
        rows = peer.generate(tokens, **given, **options)[:, tokens.shape[1] :].tolist()
        return [a[: a.index(end) + 1] if end in a else a for a in rows]

    if peer.device.type == "cpu":
        return answers
    took = {}
    for cache in (None, "static"):
        try:
            for _ in range(3):  # the last one counts
                start = time.perf_counter()
                answers(0, cache)
                took[cache] = time.perf_counter() - start
        except Exception as e:  # no compiler, or another that it needs
            took.pop(cache, None)
            print(f"cache {cache or 'dynamic'}: {type(e).__name__}: {e}")
    best = min(took, key=took.get)
    print(f"seconds of a round by cache: {took}; {best or 'dynamic'} is taken")
    return partial(answers, cache=best)


@torch.no_grad()
def lm_eval(folder, file, n: int, batch: int, device="cpu"):
    """lm-eval and a task of its own on the first n records of a file → a function that runs it:
    for each record its choices' log-likelihoods, acc and acc_norm.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    peer = load(folder, torch.float32, device)
    peer = HFLM(pretrained=peer, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch)
    fields = dict(doc_to_text="{{query}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    fields["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    with tempfile.TemporaryDirectory() as cache:
        source = {"data_files": {"test": str(file)}, "cache_dir": cache, "keep_in_memory": True}
        fields |= dict(dataset_path="json", dataset_kwargs=source, test_split="test")
        task = ConfigurableTask(config=dict(task="own", output_type="multiple_choice", **fields))

    def turn():
        found = evaluate(peer, {"own": task}, limit=n, bootstrap_iters=0)["samples"]["own"]
        found.sort(key=lambda s: s["doc_id"])
        return [([ll for ll, _ in s["filtered_resps"]], s["acc"], s["acc_norm"]) for s in found]

    return turn
