"""Tiny random Llama-3 checkpoints in Hugging Face's format, and Llama-3's own tokenizer from the kit."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Llama-3's pre-tokenization (transformers' and llama.cpp's converters agree on it).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def special_names(reserved: int = 16) -> list[str]:
    """Control tokens in Llama 3.0's order, with `reserved` reserved ones."""
    head = ["<|begin_of_text|>", "<|end_of_text|>"]
    tail = ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    rest = [f"<|reserved_special_token_{n}|>" for n in range(5, reserved + 1)]
    return [*head, *(f"<|reserved_special_token_{n}|>" for n in range(4)), *tail, *rest][: 5 + reserved]


def byte_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A byte-level BPE with Llama-3's pre-tokenization."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@lru_cache
def tiny_tokenizer() -> Tokenizer:
    """256 bytes, a few merges, bos/eos/headers/eot and 16 reserved tokens."""
    tokenizer = byte_bpe({}, [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    text = ["user system assistant\n\n", "What does the sign say? It says stop.", "a red circle"]
    tokenizer.train_from_iterator(text * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special_names()])
    return tokenizer


def llama3_tokenizer(kit: Path) -> Tokenizer:
    """Llama-3's real tokenizer, from Meta's tokenizer.model (tiktoken BPE) and a Hugging Face config."""
    return Tokenizer.from_str(_llama3_json(kit))


@lru_cache
def _llama3_json(kit: Path) -> str:
    """Finding 280,000 merges takes seconds."""
    folder = kit / "tokenizers" / "llama3"
    config = json.loads((folder / "hf_WebR" / "tokenizer_config.json").read_text())
    lines = (folder / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    tokenizer = byte_bpe({spell(t): r for t, r in ranks.items()}, [(spell(a), spell(b)) for a, b in merges])
    added = sorted((int(i), entry["content"]) for i, entry in config["added_tokens_decoder"].items())
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for _, name in added])
    return str(tokenizer.to_str())


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and tokenizer_config.json, as in a Llama-3 repository."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_llama(
    directory: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int | None = None,
    tie: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    head_dim: int | None = None,
    max_positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a random LlamaForCausalLM (weights enlarged, so that parity means something) and a tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    write_tokenizer(Path(directory), tokenizer)
    end, eot = (tokenizer.token_to_id(name) for name in ("<|end_of_text|>", "<|eot_id|>"))
    rope = {"rope_theta": 500000.0, **(rope_scaling or {"rope_type": "default"})}
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        vocab_size=vocab or tokenizer.get_vocab_size(),
        rms_norm_eps=1e-5,
        max_position_embeddings=max_positions,
        rope_parameters=rope,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=eot,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.mul_(5 if "embed" not in name else 10)
    model.generation_config = GenerationConfig(eos_token_id=[end, eot], bos_token_id=config.bos_token_id)
    model.save_pretrained(directory)
    return Path(directory)
