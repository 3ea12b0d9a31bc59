# Seconds: does everything run? A tiny model on the built-in word problems.
#
# It also shows the collapse that the published loss alone ends in: cosine 1 for right and for wrong
# pairs. Training warns of it and names the cure.
dataset = "word_problems"
tokenizer = "bpe"
bpe_vocab_size = 1024
n_layer = 2
n_head = 2
n_embd = 64
max_iters = 40
batch_size = 8
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 5
eval_interval = 20
eval_pairs = 64
log_interval = 5

jepa_loss = "cosine"
jepa_weight = 1.0
spread = "none"
spread_weight = 0.0
