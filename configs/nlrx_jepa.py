# English -> regex with JEPA: a 3.3M model on the built-in generator, or on any file of pairs with
# --dataset=path.jsonl (the official repository's messages, question/answer or text/code).
dataset = "regex"
tokenizer = "bpe"
# With 1,024 tokens, some span the end of one rule and the start of the next: .67 of NL-RX-Synth is
# answered exactly, with 400 tokens .77, and with labels on the description as well .81.
bpe_vocab_size = 400
labels = "all"
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 32
max_iters = 1000
learning_rate = 1e-3
min_lr = 1e-4
eval_interval = 250
log_interval = 50

jepa_loss = "cosine"
jepa_weight = 0.3
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 100
