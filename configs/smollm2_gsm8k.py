# Fine-tune SmolLM2-135M-Instruct on GSM8K with JEPA, as a chat: see smollm2_jepa.
base = "smollm2_jepa"
dataset = "gsm8k"
train_rows = 0
template = "chat"
block_size = 512
max_iters = 500
eval_interval = 100
