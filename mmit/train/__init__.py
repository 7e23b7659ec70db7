"""Training: stages under DeepSpeed, launched, resumed, recorded."""
