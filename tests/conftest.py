import torch
from hypothesis import settings

# Tiny tensors: a thread that waits for a busy neighbour costs more than all of them compute.
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")
