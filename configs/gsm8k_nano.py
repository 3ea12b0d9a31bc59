# gsm8k_jepa in small: 5M parameters and a BPE of 8192 tokens, for two cores and a few minutes.
dataset = "gsm8k"
tokenizer = "bpe"
bpe_vocab_size = 8192
n_layer = 4
n_head = 4
n_embd = 256
max_iters = 500
batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4

n_pred = 1
jepa_loss = "cosine"
jepa_weight = 0.5
spread = "cross"
spread_weight = 1.0
