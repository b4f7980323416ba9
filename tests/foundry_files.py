"""What LLM Foundry reads, made here without a network: a tokenizer, texts to finetune on, packed tokens, configs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

#: The longest sequence, in tokens.
LENGTH = 24
WORDS = [f"{one}{other}" for one in "bdfgklmnprst" for other in ("a", "e", "i", "o", "u", "ai")]
#: The minibatch of each process.
BATCH = 8
KEEP = 0.5
ON = {"start": 0.0, "end": 1.0, "interrupt": 0, "keep": KEEP}
STRATEGIES = {
    "gradmatch": ON,
    "random_backprop": ON,
    "loss_backprop": ON,
    "importance_backprop": ON,
    "rule_backprop": {**ON, "rule": "top_loss"},
}


def write_all(folder: Path) -> None:
    """Writes ``tokenizer/``, ``chats/train.jsonl``, ``tokens/`` (MDS) and ``llama/config.json`` into a folder."""
    write_tokenizer(folder / "tokenizer")
    write_chats(folder / "chats")
    write_tokens(folder / "tokens")
    write_llama(folder / "llama")


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    ).save_pretrained(folder)


def write_chats(folder: Path, size: int = 96) -> None:
    """Prompts and responses of many lengths, so that samples have few or many tokens to learn from."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(size):
            prompt = draw.choices(WORDS, k=draw.randint(2, 8))
            response = draw.choices(WORDS[:12], k=draw.randint(1, 9))
            print(json.dumps({"prompt": " ".join(prompt), "response": " " + " ".join(response)}), file=file)


def write_tokens(folder: Path, size: int = 96) -> None:
    """Sequences of full length, each of several texts that end with <eos>, as pretraining reads them."""
    from streaming import MDSWriter

    draw = np.random.default_rng(0)
    with MDSWriter(out=str(folder / "train"), columns={"tokens": "ndarray:int32"}) as writer:
        for _ in range(size):
            tokens = draw.integers(3, len(WORDS) + 3, LENGTH)
            tokens[draw.choice(LENGTH - 1, 2, replace=False)] = 1
            writer.write({"tokens": tokens.astype(np.int32)})


def write_llama(folder: Path) -> None:
    """A HuggingFace model as far as LLM Foundry needs it: its config, from which weights are drawn."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    ).save_pretrained(folder)


def mpt(tied: bool, packed: bool) -> dict[str, Any]:
    return {
        "name": "mpt_causal_lm",
        "init_device": "cpu",
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": LENGTH,
        "vocab_size": len(WORDS) + 3,
        "attn_config": {"attn_impl": "torch", "attn_uses_sequence_id": packed},
        "loss_fn": "torch_crossentropy",
        **({} if tied else {"tie_word_embeddings": False}),
    }


def llama(folder: Path) -> dict[str, Any]:
    return {
        "name": "hf_causal_lm",
        "init_device": "cpu",
        "pretrained": False,
        "pretrained_model_name_or_path": str(folder / "llama"),
        "use_train_metrics": True,
    }


def loader(folder: Path, data: str) -> dict[str, Any]:
    """A ``train_loader``: ``chats`` padded, ``packed chats``, or ``tokens`` packed in advance."""
    rest = {
        "drop_last": True,
        "num_workers": 0,
        "pin_memory": False,
        "prefetch_factor": None,
        "persistent_workers": False,
    }
    if data == "tokens":
        dataset = {"local": str(folder / "tokens"), "split": "train", "shuffle": True, "max_seq_len": LENGTH}
        return {"name": "text", "dataset": {**dataset, "eos_token_id": 1}, **rest}
    dataset = {
        "hf_name": str(folder / "chats"),
        "split": "train",
        "max_seq_len": LENGTH,
        "decoder_only_format": True,
        "allow_pad_trimming": data == "chats",
        "shuffle": True,
    }
    if data == "packed chats":
        dataset["packing_ratio"] = 1.5
    return {"name": "finetuning", "dataset": dataset, **rest}


def config(folder: Path, model: str, data: str, algorithms: dict[str, Any], world: int, **more: Any) -> dict[str, Any]:
    """A whole config of LLM Foundry."""
    models = {
        "mpt": lambda: mpt(True, data != "chats"),
        "untied mpt": lambda: mpt(False, data != "chats"),
        "llama": lambda: llama(folder),
    }
    return {
        "max_seq_len": LENGTH,
        "model": models[model](),
        "tokenizer": {"name": str(folder / "tokenizer"), "kwargs": {"model_max_length": LENGTH}},
        "train_loader": loader(folder, data),
        "optimizer": {
            "name": "decoupled_adamw",
            "lr": 3.0e-3,
            "betas": [0.9, 0.95],
            "eps": 1.0e-8,
            "weight_decay": 0.0,
        },
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba", "alpha": 1.0},
        "global_train_batch_size": BATCH * world,
        "device_train_microbatch_size": 2,
        "device_eval_batch_size": BATCH,
        "accumulate_train_batch_on_tokens": True,
        "max_duration": "2ba",
        "precision": "fp32",
        "seed": 7,
        "eval_interval": 0,
        "log_to_console": False,
        "algorithms": algorithms,
        **more,
    }


def write_config(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def launch(folder: Path, world: int) -> str:
    """Trains all configs of a folder in one launch of so many processes; returns what is said."""
    worker = str(Path(__file__).with_name("foundry") / "worker.py")
    return program(
        ["python" if world == 1 else "composer", *([] if world == 1 else ["-n", "2"]), worker, str(folder)], folder
    )


def program(command: list[str], folder: Path) -> str:
    """Runs a program of this environment in a folder; returns what it says."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said
