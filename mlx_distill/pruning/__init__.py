"""A student made before distilling: its base model with fewer blocks, channels or heads."""
