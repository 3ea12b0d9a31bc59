# The main job: the model of the original (6 layers, 8 heads, 512 channels, GPT-2's vocabulary,
# 45M parameters) on GSM8K, cross-entropy and cosine JEPA.
dataset = "gsm8k"
tokenizer = "gpt2"
n_layer = 6
n_head = 8
n_embd = 512
max_iters = 500
batch_size = 16

# Cosine alone collapses. `cross` pushes wrong pairs to cosine 0 and leaves the right ones alone;
# both weights grow from 0, and half of the steps skip JEPA, which halves its cost. The
# search: log/.
n_pred = 1
jepa_loss = "cosine"
jepa_weight = 0.3
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 100
jepa_dropout = 0.5
