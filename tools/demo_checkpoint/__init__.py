"""Make the demo checkpoint: pictures, training, textual inversion and evaluation."""
