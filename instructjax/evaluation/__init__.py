"""What a trained model is worth: figures with intervals, and their tables."""
