# The reversal curse: facts e1 r e2, some in both directions, some (atomic) in one. Can the model
# say the inverse of an atomic fact, which it never saw? JEPA predicts a fact's inverse from it.
dataset = "relations"
views = "facts"
tokenizer = "words"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 16
batch_size = 128
max_iters = 3000  # by then 96 % of the facts are known by heart
learning_rate = 1e-3
weight_decay = 0.0  # all that is asked of it is memory
eval_interval = 500
log_interval = 50

jepa_loss = "cosine"
jepa_weight = 0.5
spread = "cross"
spread_weight = 1.0
