"""The model as plain `nn.Module`s: nothing here knows about ranks, and no tensor is flipped."""
