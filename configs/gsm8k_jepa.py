# The main job: the model of the original (6 layers, 8 heads, 512 channels, GPT-2's vocabulary,
# 45M parameters) on GSM8K, cross-entropy and cosine JEPA.
# Two cores with avx512_bf16: about 15 minutes. One GPU: seconds.
dataset = "gsm8k"
tokenizer = "gpt2"
n_layer = 6
n_head = 8
n_embd = 512
max_iters = 500
batch_size = 16
