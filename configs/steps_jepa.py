# Step-JEPA: predict the next step of a worked answer from the question and the steps so far. GSM8K
# where it can be had, else word problems.
dataset = "gsm8k"
views = "steps_random"  # of two neighbouring steps, a random pair
tokenizer = "bpe"
n_layer = 4
n_head = 4
n_embd = 256
max_iters = 500
learning_rate = 2e-3
min_lr = 2e-4

jepa_loss = "cosine"
jepa_weight = 0.3
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 100
