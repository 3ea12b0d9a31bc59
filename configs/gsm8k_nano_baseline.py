# gsm8k_nano without JEPA: the plain language model on the same seed, data order and code path.
base = "gsm8k_nano"
jepa_weight = 0.0  # switches the spread term off as well
