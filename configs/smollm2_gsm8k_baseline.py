# smollm2_gsm8k without JEPA: plain fine-tuning on the same seed, data order and code path.
base = "smollm2_gsm8k"
jepa_weight = 0.0  # switches the spread term off as well
