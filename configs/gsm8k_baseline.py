# gsm8k_jepa without JEPA: the plain language model on the same seed, data order and code path.
# jepa_weight alone differs (a test holds the two files to that), and at 0 it switches the rest off.
dataset = "gsm8k"
tokenizer = "gpt2"
n_layer = 6
n_head = 8
n_embd = 512
max_iters = 500
batch_size = 16
n_pred = 1
jepa_loss = "cosine"
jepa_weight = 0.0
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 100
jepa_dropout = 0.5
