"""Run by `make wheel-check` beside nothing but the installed wheel: import it and sift once."""

import importlib.util

import torch

import siftloader


assert "site-packages" in siftloader.__file__, siftloader.__file__
for extra in ("webdataset", "torchdata", "transformers", "tokenizers"):
    assert importlib.util.find_spec(extra) is None, f"{extra} should not be needed"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 4, (64,)))
loader = siftloader.SiftingDataLoader(data, 8, model=Net(), warmup_steps=0)
assert len(list(loader)) == len(loader) == 4
print(f"siftloader {siftloader.__version__} on torch {torch.__version__}: sifted 4 batches")
