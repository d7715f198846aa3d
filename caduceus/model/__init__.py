"""The model as plain `nn.Module`s: nothing here knows of ranks, and no tensor is flipped."""
