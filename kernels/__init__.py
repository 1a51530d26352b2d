"""The fused contrastive loss: rows, groups and weights; nothing of images."""
