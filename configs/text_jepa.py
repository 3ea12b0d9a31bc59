# Views from running text: a block's second half is predicted from its first. Any text file with
# --dataset=path.txt; without one, the word problems run together. On that built-in text the views
# do not align: a block's second half is mostly other problems than its first.
dataset = "word_problems"
views = "split"
jepa_split = 0.5
labels = "all"
tokenizer = "bpe"
bpe_vocab_size = 2048
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
max_iters = 500
learning_rate = 2e-3
min_lr = 2e-4

jepa_loss = "cosine"
jepa_weight = 0.3
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 100
