"""Tiny random models of transformers, and a tokenizer, as folders that --trunk= takes."""

import json

import tokenizers
import torch
import transformers
from conftest import sums

SIZES = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=64, head_dim=8,
             max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)  # fmt: skip
OTHERWISE = {
    "gpt2": dict(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "falcon": dict(alibi=False, new_decoder_architecture=False),
    "bloom": dict(vocab_size=320, hidden_size=32, n_layer=2, n_head=4),
    "mistral": dict(sliding_window=32),
    "gemma3_text": dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
    "gemma2": dict(sliding_window=32),
    "mamba": dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gpt_neo": dict(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4,
                    attention_types=[[["global"], 2]], max_position_embeddings=64),
    "qwen3_5_text": dict(layer_types=["linear_attention", "full_attention"],
                         linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                         linear_value_head_dim=8),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "granite": dict(logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": dict(logit_scale=0.25),
}  # fmt: skip
ALONE = {"gpt2", "bloom", "mamba", "gpt_neo"}  # whose config names its sizes otherwise


def tiny_lm(kind: str, seed: int = 0, **options):
    sizes = {} if kind in ALONE else SIZES
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **OTHERWISE.get(kind, {}),
                                                        **options})  # fmt: skip
    torch.manual_seed(seed)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in lm.parameters():  # weights that leave a mark; a norm near 1
        p.data += torch.randn_like(p) * 0.1
    return lm.eval()


CHAT = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")  # fmt: skip


def tiny_tokenizer(template: str = CHAT):
    """A byte-level BPE of at most 320 tokens with four special ones."""
    special = ["<pad>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator([json.dumps(row) for row in sums(50)], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=special[3:], chat_template=template)  # fmt: skip


def tiny_folder(folder, kind: str = "llama", template: str = CHAT, seed: int = 0, **options):
    """Model and tokenizer of a kind in `folder`, laid out as the hub has them."""
    tiny_lm(kind, seed, **options).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder
