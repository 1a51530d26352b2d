"""Networks: encoders, the quality decoder, saliency, released models."""
